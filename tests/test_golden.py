"""The sites found in 49 well-known architectures against where their papers and their modeling files put them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from golden import GOLDEN, Golden

from adapters._contract import StreamSite
from adapters._sites import SiteMap, sites

pytestmark = pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.type)


@functools.cache
def mapped(type: str) -> tuple[Any, SiteMap]:
    golden = next(each for each in GOLDEN if each.type == type)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(golden.type, **golden.config)
    model = getattr(transformers, golden.cls)(config).eval()
    return model, sites(model)


def within(path: str, golden: Golden) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in golden.blocks)


def read(site: StreamSite) -> tuple[str, int | str | None]:
    if site.tap is not None:
        return "module", site.tap
    return "argument", site.input


def test_streams_are_where_the_papers_put_adapters(golden: Golden) -> None:
    found = [site for site in mapped(golden.type)[1].streams if within(site.path, golden) and site.default]
    assert [(site.path, site.output) for site in found] == [(each.path, each.key) for each in golden.streams]
    for site, expected in zip(found, golden.streams, strict=True):
        assert site.branch in expected.kinds, site.path
        assert read(site) in expected.reads, site.path


def test_attentions_are_found(golden: Golden) -> None:
    model, found = mapped(golden.type)
    known = {site.path: site for site in found.keyvalues if within(site.path, golden)}
    for expected in golden.attentions:
        site = known.pop(expected.path)
        assert (site.heads, site.causal) == (expected.heads(model.config), expected.causal), expected.path
        assert (site.product is None) is (expected.how == "interface"), expected.path
        assert site.default, site.reason
    assert not known


def test_weights_have_their_roles(golden: Golden) -> None:
    found = {site.path: site.role for site in mapped(golden.type)[1].weights if within(site.path, golden)}
    wrong = {path: (found.get(path), roles) for path, roles in golden.roles.items() if found.get(path) not in roles}
    assert not wrong
