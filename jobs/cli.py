"""`cellray …`: thin, each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import serve_config
from cluster import settings as settings_module
from cluster.errors import CellrayError, InvalidInput

DEFAULT_SERVE_CONFIG = Path("deploy/serve.local.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return arguments.run(arguments)
    except CellrayError as error:
        print(f"cellray {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput) else 1
    except KeyboardInterrupt:
        print(f"cellray {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="cellray",
        description="Segment Anything embeddings and masks for millions of images, on Ray.",
        epilog="The jobs are run as `python -m jobs.embed` and `python -m jobs.segment`; each has --help.",
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    extract = commands.add_parser(
        "extract",
        help="split a checkpoint into encoder and decoder",
        description="Split a Segment Anything checkpoint into OUT/encoder.safetensors, OUT/decoder.safetensors and "
        "OUT/model.json, and print which parameters went where. Nothing in the checkpoint is executed.",
    )
    extract.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pth or .safetensors file, or a model's name")
    extract.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    extract.add_argument("--licence", default="unknown", help="recorded in model.json, data sets and /v1/models")
    extract.add_argument("--config", help="settings YAML")
    extract.set_defaults(run=_extract)

    samples = commands.add_parser("samples", help="write real sample images of many formats", add_help=False)
    samples.add_argument("rest", nargs=argparse.REMAINDER)
    samples.set_defaults(run=_samples)

    show = commands.add_parser(
        "show", help="draw a data set's images with their masks", description="Write a contact sheet of a data set."
    )
    show.add_argument("dataset", metavar="OUT", help="an output of the jobs, a folder or s3://…")
    show.add_argument("--to", type=Path, default=Path("."), help="folder for index.html and contact.png (default: .)")
    show.add_argument("--images", type=int, default=120, help="at most this many (default: %(default)s)")
    show.add_argument("--config", help="settings YAML")
    show.set_defaults(run=_show)

    for name, text in (
        ("serve", "start Ray and the app here, until Ctrl-C"),
        ("demo", "embed and segment real images"),
    ):
        one = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        one.add_argument("--serve-config", type=Path, default=DEFAULT_SERVE_CONFIG, help="(default: %(default)s)")
        one.set_defaults(run=_serve if name == "serve" else _demo)
        if name == "demo":
            one.add_argument("--to", type=Path, default=Path("demo"), help="folder to fill (default: %(default)s)")
            one.add_argument("--config", help="settings YAML")
    return made


def _extract(arguments: argparse.Namespace) -> int:
    from cluster import weights
    from cluster.settings import ModelSettings
    from serve_app import models
    from serve_app.model import checkpoint

    settings = settings_module.load(arguments.config)
    model = settings.models.get(arguments.checkpoint) or ModelSettings(
        source=arguments.checkpoint, licence=arguments.licence
    )
    state, digest, trained = models.read(model, settings)
    card = checkpoint.extract(
        state,
        arguments.out,
        source=weights.public_source(model.source),
        source_sha256=digest,
        licence=model.licence,
        trained=trained,
    )
    print(f"{'half':8} {'part':34} {'tensors':>8} {'parameters':>12}")
    for half, part, tensors, numbers in checkpoint.parameter_table(state):
        print(f"{half:8} {part:34} {tensors:8} {numbers:12,}")
    print(f"\n{card.family}, input {card.architecture.image_size} px; written to {arguments.out}/")
    print(f"encoder.safetensors  sha256 {card.encoder_sha256}")
    print(f"decoder.safetensors  sha256 {card.decoder_sha256}")
    return 0


def _samples(arguments: argparse.Namespace) -> int:
    from jobs import samples

    return samples.main(arguments.rest)


def _show(arguments: argparse.Namespace) -> int:
    from jobs import show

    if arguments.images < 1:
        raise InvalidInput(f"--images {arguments.images}: expected at least 1")
    settings = settings_module.load(arguments.config)
    page, picture = show.write(settings, arguments.dataset, arguments.to, arguments.images)
    print(f"{page}\n{picture}")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    from jobs import demo

    return demo.serve(serve_config.read(arguments.serve_config), signal.pause)


def _demo(arguments: argparse.Namespace) -> int:
    from jobs import demo

    settings = settings_module.load(arguments.config)
    return demo.run(settings, serve_config.read(arguments.serve_config), arguments.to)


if __name__ == "__main__":
    sys.exit(main())
