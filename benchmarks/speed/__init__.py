"""A step of the trainer beside the fastest step of TRL with PEFT, on equal rows and tensors."""
