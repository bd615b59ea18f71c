"""Publishes a saved adapter: checked, scanned, described, tried, and then uploaded in one commit."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters._errors import AdapterError
from adapters._hub.quiet import quiet
from adapters._publish.card import Licenses, published_card, snippet
from adapters._publish.leaks import leaks
from adapters._publish.license import license_of
from adapters._store import commit
from adapters._store.bundle import CARD, CONFIG, OWNED, PARTS, RECORD, Bundle
from adapters._store.reading import open_folder, resolve

PICTURE = "training.png"  # which recipes leave beside the adapter


@dataclass(frozen=True)
class PublishReport:
    """What was published, or would be.

    Args:
        repo: ORG/NAME.
        commit: the revision that holds it, for `adapters.load(model, "hub:ORG/NAME@COMMIT")`; "" in a dry run.
        files: bytes by name.
        license: the adapter's.
        card: the text of the card.
        ran: what the card's program printed, "" where it was not run.
    """

    repo: str
    commit: str
    files: Mapping[str, int]
    license: str
    card: str
    ran: str

    def __str__(self) -> str:
        head = (
            f"published {self.repo} at {self.commit}" if self.commit else f"would publish {self.repo}; nothing was sent"
        )
        lines = [head, *(f"  {name:<28}{size:>12,} bytes" for name, size in self.files.items())]
        lines.append(f"  licence: {self.license}")
        if self.commit:
            lines.append(f'  adapters.load(model, "hub:{self.repo}@{self.commit}")')
        return "\n".join(lines)


def publish(
    folder: str | os.PathLike[str],
    to: str,
    *,
    base: str | None = None,
    license: str | None = None,
    base_license: str | None = None,
    data_license: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    try_it: bool = True,
    token: str | None = None,
) -> PublishReport:
    """Uploads a saved adapter to the Hub, with a card made of its record, in one commit.

    Everything is checked before anything is sent, and the commit is the last step: an upload that is cut off changes
    nothing there, and what it has sent already is not sent again by the next one.

    Args:
        folder: an adapter that `adapters.save` wrote.
        to: ORG/NAME; the repository is made if there is none.
        base: the base's name for others, an embedded name or a Hub id; by default the recorded one.
        license: the adapter's; by default the base's.
        base_license: the base's; by default that of its pin, or of its card on the Hub.
        data_license: of what it was trained on; by default what the record says.
        private: of a repository that is made now.
        dry_run: checks everything, sends nothing.
        try_it: runs the card's program on the folder, which loads the base.
        token: of the Hub; by default the one of `hf auth login` or HF_TOKEN.

    Raises:
        AdapterError: a local path or a secret is in the files, a licence is not known, the card's program fails, or the
            Hub refuses.
        DamagedAdapter: the folder is not what was saved.
    """
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", to):
        raise AdapterError(f"{to!r} is no repository: give ORG/NAME.")
    place = resolve(folder)
    files, bundle = _files(place)
    name = base or (bundle.base or {}).get("name")
    if not name:
        raise AdapterError(
            "the record does not name the base (it came from a folder): give base=, where others find it."
        )
    known = base_license or license_of(name)
    ran = _tried(name, place, bundle) if try_it else ""
    peft = "reads this folder, too" if _is_pefts(files) else "cannot read this folder"
    licenses = Licenses(license or known, known, data_license or str(bundle.training.get("data_license") or ""))
    files[CARD] = published_card(bundle, to, name, licenses, peft, ran, PICTURE in files)
    found = list(leaks(files))
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise AdapterError(
            f"nothing was published: {found[0]}{more}. Save the adapter without it (facts=, the base's name), and "
            "publish again."
        )
    sizes = {key: len(content) for key, content in files.items()}
    revision = "" if dry_run else _upload(files, to, private, token, bundle)
    return PublishReport(to, revision, sizes, license or known, files[CARD].decode(), ran)


def _files(place: str) -> tuple[dict[str, bytes], Bundle]:
    with commit.reading(place) as view:
        if PARTS in view:
            raise AdapterError(f"{place} holds a composition: publish the adapters that it is made of.")
        if RECORD not in view:
            raise AdapterError(
                f"{place} was not saved by this library, and says nothing of its base: load it, save it, and publish "
                "that."
            )
        files = {name: bytes(view[name]) for name in OWNED if name in view and name != CARD}
    picture = Path(place) / PICTURE
    if picture.is_file():
        files[PICTURE] = picture.read_bytes()
    return files, open_folder(place, None)


def _is_pefts(files: Mapping[str, bytes]) -> bool:
    return CONFIG in files and b'"peft_type": "ADAPTERS"' not in files[CONFIG]


def _tried(base: str, place: str, bundle: Bundle) -> str:
    """What the card's program prints, with the folder in place of the repository."""
    said = io.StringIO()
    try:
        with quiet(), contextlib.redirect_stdout(said):
            exec(compile(snippet(base, place, bundle), "the card's program", "exec"), {})
    except Exception as error:
        raise AdapterError(
            f"nothing was published: the program of its card fails with {type(error).__name__}: {error}"
        ) from error
    return said.getvalue().replace(place, "the folder")


def _upload(files: Mapping[str, bytes], to: str, private: bool, token: str | None, bundle: Bundle) -> str:
    """The new commit, whose files are those that were sent."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(to, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        made: Any = api.create_commit(to, operations, commit_message=f"Adapter {bundle.name}")
        there = {each.path: each for each in api.get_paths_info(to, list(files), revision=made.oid)}
    except Exception as error:  # the Hub's client has a dozen kinds, from a refused token to a cut connection
        raise AdapterError(
            f"{to} was not published ({type(error).__name__}: {_first_line(error)}). The commit is the last step, so "
            "nothing is half there: publish again to go on."
        ) from error
    for name, content in files.items():
        held: Any = there.get(name)
        lfs = getattr(held, "lfs", None)
        other = lfs is not None and lfs.sha256 != hashlib.sha256(content).hexdigest()
        if held is None or held.size != len(content) or other:
            raise AdapterError(f"{name} in {to}@{made.oid} is not what was sent: publish again.")
    return str(made.oid)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
