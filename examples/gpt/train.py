"""Train a byte-level GPT on the Python standard library.

    python examples/gpt/train.py fit --config configs/gpt_nvme.yaml

The strategy is one entry of that file. Any option of the model, the data or the Trainer can be given in it or on the
command line, such as ``--model.width 512``; ``--help`` and ``fit --help`` list them.
"""

from __future__ import annotations

from data import PythonLibrary
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from module import GPTModule


class GPTCLI(LightningCLI):
    """LightningCLI that gives the model the window length of the data."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let ``data.block_size`` set ``model.block_size``, so that the two cannot differ."""
        parser.link_arguments("data.block_size", "model.block_size")


def main() -> None:
    """Run the command line."""
    GPTCLI(GPTModule, PythonLibrary, seed_everything_default=1234, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
