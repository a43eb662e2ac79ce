"""`cellray …`: thin, each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import serve_config
from cluster import settings as settings_module
from cluster.errors import CellrayError, InvalidInput

MODEL = "a model's name, a checkpoint, or a folder by `cellray extract`"
DATASET = "an output of the jobs, a folder or s3://…"
EXPORT_ONNX = """Write a model's prompt encoder and mask decoder to OUT as ONNX, under segment_anything's names: a
browser, or a program with onnxruntime, makes masks from stored embeddings. Needs `pip install 'cellray[onnx]'`.

inputs, float32:                                  outputs, float32:
  image_embeddings  [1, C, g, g]                    masks            [N, 4, height, width]  logits, > 0 is inside
  point_coords      [N, K, 2] x, y                  iou_predictions  [N, 4]
  point_labels      [N, K]                          low_res_masks    [N, 4, 4g, 4g]
  mask_input        [1, 1, 4g, 4g]
  has_mask_input    [1] 1 or 0
  orig_im_size      [2] height, width

Coordinates are pixels of the resized image, whose long side is the model's input size (1024 for B, L, H). Labels: 1
foreground, 0 background, 2 and 3 a box's first and second corner, -1 padding; end points without a box with one padding
point. Of the 4 masks the first is the single answer, the others are whole, part and subpart in the model's order."""
EXPORT_ONNX_EXAMPLE = """example:
  cellray export-onnx sam_vit_b decoder.onnx

  session = onnxruntime.InferenceSession("decoder.onnx")
  masks, scores, low = session.run(None, {
      "image_embeddings": embedding[None].astype("float32"),
      "point_coords": np.float32([[[120, 80], [310, 260]]]), "point_labels": np.float32([[2, 3]]),
      "mask_input": np.zeros((1, 1, 256, 256), "float32"), "has_mask_input": np.zeros(1, "float32"),
      "orig_im_size": np.float32([768, 1024])})
"""


EXPORT = """Write what a data set holds for other tools:

coco    its masks as one COCO file of instances, the file TARGET
labels  its masks as label images in the folder TARGET: a TIFF an image, 0 for background, and where masks overlap the
        smallest of them; above 67 million pixels in tiles, of any size in less than 2 GB of memory
zarr-labels
        the same as IMAGE.zarr, OME-NGFF label images of one resolution. Needs `pip install 'cellray[zarr]'`
zarr    its embeddings for micro-sam in the folder TARGET: IMAGE.zarr an image, which micro_sam's annotators take as
        embedding path instead of running the encoder. The images are read again, since micro-sam compares their hash;
        one that cannot be, or has changed, is named and left out, and the exit code is 1. Needs
        `pip install 'cellray[zarr]'`.

Tiles of an image that failed are holes: they are printed, and stand with the image, in COCO's `holes`, the TIFF's
description or Zarr's attributes; the exit code is 1."""
EXPORT_EXAMPLE = """examples:
  cellray export out --to coco masks.json
  cellray export s3://b/out --to labels ~/labels
  cellray export ~/plates-out --to zarr ~/embeddings --micro-sam-model vit_b_lm
  micro_sam.image_series_annotator -i ~/plates -o ~/labels -e ~/embeddings -m vit_b_lm"""
COMPACT = """Merge a data set's many small files (of small shards, --retry-errors and --update) into few, and drop the
rows that newer ones have taken the place of. Embeddings become files of up to 512 rows, still one a row group; masks
and errors files of up to about 64 MiB. Files that are more than half of that stay as they are.

The jobs on OUT must be done. What is merged is committed file by file as the next generation: readers see each row
once at any moment, --retry-errors and --update go on afterwards, and killed anywhere, the same command goes on. The
old files stay until --delete-old, which frees their space; what is reading them then (jobs.segment --embeddings, a
copy) fails and has to be started again; a running service looks for the new ones. Each of 4 files at a time has up to
2.5 GB in TMPDIR."""
COMPACT_EXAMPLE = """examples:
  cellray compact s3://plates/out --dry-run
  cellray compact s3://plates/out && cellray verify s3://plates/out && cellray compact s3://plates/out --delete-old"""

WEIGHTS = """Checkpoints on this node. Replicas fetch what they lack when they start; to have it there before:

list    the models of the settings, whether this node has them, their licence and where they come from
fetch   download, check, split and keep MODEL; an interrupted download goes on where it was
verify  read MODEL's files here and compare their sha256
where   print the folder that MODEL is kept in, and nothing else; exit code 1 if it is not there yet

CellSAM's weights need a DeepCell access token (https://users.deepcell.org). It is read from the file that
DEEPCELL_ACCESS_TOKEN_FILE names, from /run/secrets/deepcell_access_token, or from DEEPCELL_ACCESS_TOKEN; `fetch` asks
for it where there is none. It is sent to DeepCell alone, and kept nowhere."""
WEIGHTS_EXAMPLE = """examples:
  cellray weights list
  cellray weights fetch cellsam_general
  DEEPCELL_ACCESS_TOKEN_FILE=~/deepcell.token cellray weights fetch cellsam_general"""

KEY = """Print a new random key for the service, once, and the line with its hash for the keys file that service.keys of
the settings names. Nothing is written. A number at the line's end is how many requests a minute this key may send. A
service that runs reads the file again when it has changed; a key whose line is gone is refused from then on."""
KEY_EXAMPLE = """example:
  cellray key alice
  curl -H 'authorization: Bearer cellray_…' http://host:8000/v1/models"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also where a shell has made us ignore SIGINT
    try:
        return arguments.run(arguments)
    except CellrayError as error:
        print(f"cellray {arguments.command}: {error}", file=sys.stderr)
        verdicts = arguments.command == "gate"  # its 1 says that a rule is broken
        return 2 if verdicts or isinstance(error, InvalidInput) else 1
    except KeyboardInterrupt:
        print(f"cellray {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    from jobs import cli_cluster, client

    made = argparse.ArgumentParser(
        prog="cellray",
        description="Segment Anything embeddings and masks for millions of images, on Ray.",
        epilog="`cellray up` is where to start. The jobs are run as `python -m jobs.embed` and `python -m "
        "jobs.segment`; each has --help.",
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], brief: str, about: str, epilog: str = "") -> Any:
        shown = argparse.RawDescriptionHelpFormatter if "\n" in about + epilog else argparse.HelpFormatter
        one = commands.add_parser(name, help=brief, description=about, epilog=epilog, formatter_class=shown)
        one.set_defaults(run=run)
        return one

    extract = command(
        "extract",
        _extract,
        "split a checkpoint into encoder, decoder and detector",
        "Split a Segment Anything or CellSAM checkpoint into OUT/encoder.safetensors, OUT/decoder.safetensors, of a "
        "CellSAM OUT/detector.safetensors, and OUT/model.json, and print which parameters went where. Nothing in the "
        "checkpoint is executed.",
    )
    extract.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a file by torch.save or safetensors, a folder by Hugging Face's save_pretrained, a URL, or a model",
    )
    extract.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    extract.add_argument("--licence", default="unknown", help="recorded in model.json, data sets and /v1/models")
    extract.add_argument("--float16", action="store_true", help="keep the numbers in float16")
    extract.add_argument("--modelconfig", metavar="YAML", help="a CellSAM's modelconfig.yaml; must fit its detector")

    weights = command("weights", _weights, "list, fetch and verify checkpoints on this node", WEIGHTS, WEIGHTS_EXAMPLE)
    weights.add_argument("action", choices=("list", "fetch", "verify", "where"), metavar="ACTION", help="one of these")
    weights.add_argument("models", nargs="*", metavar="MODEL", help="by name in the settings")

    inspected = command(
        "inspect",
        _inspect,
        "show what is in a checkpoint",
        "Print a checkpoint's architecture as a tree, with shapes and parameter counts, by the names that this package "
        "gives its parts, and which deployment would hold what. Nothing in the checkpoint is executed.",
    )
    inspected.add_argument("checkpoint", metavar="CHECKPOINT", help="as of `cellray extract`")

    onnx = command(
        "export-onnx", _export_onnx, "write a model's decoder as an ONNX file", EXPORT_ONNX, EXPORT_ONNX_EXAMPLE
    )
    onnx.add_argument("model", metavar="MODEL", help=MODEL)
    onnx.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    onnx.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    onnx.add_argument("--licence", default="unknown", help="of a checkpoint; recorded in the file")

    gate = command(
        "gate",
        _gate,
        "check a runtime and dtype against segment_anything's float32",
        "Run a model in a runtime and dtype beside segment_anything's own modules in float32, on the same "
        "real images and prompts, and print how far apart they are. Exit code: 0 where every rule holds, 1 where one "
        "is broken, 2 where there was nothing to compare.",
    )
    gate.add_argument("model", metavar="MODEL", help=MODEL)
    gate.add_argument("--dtype", default="float32", help="what products are computed in (default: %(default)s)")
    gate.add_argument("--runtime", default="auto", help="as in the settings (default: %(default)s)")
    gate.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    gate.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="in place of the samples")
    gate.add_argument("--json", action="store_true", help="the figures as JSON too, as the last line")

    samples = commands.add_parser("samples", help="write real sample images of many formats", add_help=False)
    samples.add_argument("rest", nargs=argparse.REMAINDER)
    samples.set_defaults(run=_samples)

    synthetic = command(
        "synthetic",
        _synthetic,
        "write synthetic cells with their labels",
        "Write OUT/images/KIND_SEED.png and, under the same names, OUT/labels: uint16, 0 and 1..N. The "
        "same arguments give the same bytes.",
    )
    synthetic.add_argument("out", metavar="OUT", type=Path, help="the folder to write: new, or empty")
    synthetic.add_argument("--images", type=int, default=100, help="how many (default: %(default)s)")
    synthetic.add_argument("--seed", type=int, default=0, help="of the first; the others follow (default: %(default)s)")
    synthetic.add_argument("--size", type=int, default=512, help="height and width, px (default: %(default)s)")
    synthetic.add_argument("--kind", help="one kind of field (default: all, mixed); a wrong one lists them")
    synthetic.add_argument("--dtype", default="uint8", help="uint8, RGB; uint16, a TIFF of the camera's channels")

    show = command("show", _show, "draw a data set's images with their masks", "Write a contact sheet of a data set.")
    show.add_argument("dataset", metavar="OUT", help=DATASET)
    show.add_argument("--to", type=Path, default=Path("."), help="folder for index.html and contact.png (default: .)")
    show.add_argument("--images", type=int, default=120, help="at most this many (default: %(default)s)")

    verify = command(
        "verify",
        _verify,
        "check every committed file of a data set",
        "Read a data set whole, and print a line for all that is wrong: files that differ from their "
        "records, numbers that are not finite, images that are there twice, shards that are missing. Exit code: 0 "
        "where it is whole, else 1.",
    )
    verify.add_argument("dataset", metavar="OUT", help=DATASET)

    compact = command("compact", _compact, "merge a data set's many small files into few", COMPACT, COMPACT_EXAMPLE)
    compact.add_argument("dataset", metavar="OUT", help=f"{DATASET}; its jobs are done")
    compact.add_argument("--dry-run", action="store_true", help="only say how many files and bytes there would be")
    compact.add_argument("--delete-old", action="store_true", help="then delete the files whose rows are in new ones")

    export = command(
        "export", _export, "write a data set's masks or embeddings for other tools", EXPORT, EXPORT_EXAMPLE
    )
    export.add_argument("dataset", metavar="OUT", help=DATASET)
    export.add_argument("--to", choices=("coco", "labels", "zarr-labels", "zarr"), required=True)
    export.add_argument("target", metavar="TARGET", help="the file, or the folder, to write; may be s3://…")
    export.add_argument(
        "--micro-sam-model", metavar="NAME", help="with zarr: micro-sam's name of the model (default: by OUT's)"
    )

    key = command("key", _key, "make a key for the service", KEY, KEY_EXAMPLE)
    key.add_argument("name", metavar="NAME", help="whose it is: what the log and the keys file say of it")

    cli_cluster.add_commands(command)
    demo = command("demo", _demo, "embed and segment real images", "Embed and segment real images.")
    demo.add_argument(
        "--serve-config", type=Path, default=cli_cluster.DEFAULT_SERVE_CONFIG, help="(default: %(default)s)"
    )
    demo.add_argument("--to", type=Path, default=Path("demo"), help="folder to fill (default: %(default)s)")
    client.add_arguments(command("client", client.run, "ask a running service", client.ABOUT, client.EXAMPLES))
    for one in (extract, inspected, weights, onnx, gate, show, verify, compact, export, demo):
        one.add_argument("--config", help="settings YAML")
    return made


def _extract(arguments: argparse.Namespace) -> int:
    from cluster.settings import ModelSettings
    from serve_app import models
    from serve_app.model import checkpoint

    settings = settings_module.load(arguments.config)
    model = settings.models.get(arguments.checkpoint) or ModelSettings(
        source=arguments.checkpoint, licence=arguments.licence
    )
    model = model.model_copy(update={"modelconfig": arguments.modelconfig or model.modelconfig})
    card, state = models.split(settings, model, arguments.out, arguments.float16)
    print(f"{'half':8} {'part':34} {'tensors':>8} {'parameters':>12}")
    for half, part, tensors, numbers in checkpoint.parameter_table(state):
        print(f"{half:8} {part:34} {tensors:8} {numbers:12,}")
    print(f"\n{card.family}, input {card.architecture.image_size} px; written to {arguments.out}/")
    print(f"encoder.safetensors  sha256 {card.encoder_sha256}")
    if card.decoder_sha256:
        print(f"decoder.safetensors  sha256 {card.decoder_sha256}")
    else:
        print("no decoder: the checkpoint is an image encoder alone, for embeddings without masks")
    if card.detector:
        print(f"detector.safetensors sha256 {card.detector_sha256}")
        mode = "in advanced mode: model_cp is the Segment Anything model that counts, model.* is not used"
        print(f"a CellSAM {mode if card.advanced else 'without advanced mode: model is the one that counts'}")
    return 0


def _weights(arguments: argparse.Namespace) -> int:
    from jobs import weights

    return weights.run(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    from cluster.settings import ModelSettings
    from jobs import inspect
    from serve_app import models

    settings = settings_module.load(arguments.config)
    model = settings.models.get(arguments.checkpoint) or ModelSettings(source=arguments.checkpoint)
    tensors, digest, trained = models.read(model, settings)
    for line in inspect.tree(tensors):
        print(line)
    print(f"\nsha256 {digest}{'' if trained else '; random weights'}")
    return 0


def _export_onnx(arguments: argparse.Namespace) -> int:
    from cluster import weights
    from cluster.storage import mapped
    from serve_app import models
    from serve_app.model import onnx

    settings = settings_module.load(arguments.config)
    onnx.check(arguments.out, arguments.overwrite)
    name = Path(weights.public_source(arguments.model)).name
    with models.opened(settings, arguments.model, arguments.licence) as folder, mapped(str(arguments.out)):
        written = onnx.export(folder, arguments.out, name)
    print(f"{arguments.out}  {arguments.out.stat().st_size:,} bytes")
    for key, value in written.items():
        print(f"{key:14}  {value}")
    return 0


def _gate(arguments: argparse.Namespace) -> int:
    from jobs import gate

    settings = settings_module.load(arguments.config)
    report = gate.run(settings, arguments.model, arguments.runtime, arguments.device, arguments.dtype, arguments.image)
    gate.show(report)
    if arguments.json:
        print(gate.as_json(report))
    return 0 if report.passed else 1


def _samples(arguments: argparse.Namespace) -> int:
    from jobs import samples

    return samples.main(arguments.rest)


def _synthetic(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from jobs import synthetic

    side, images = arguments.size, arguments.images
    with tqdm(total=max(images, 0), unit="image") as bar:
        found = synthetic.write(
            arguments.out, images, arguments.seed, (side, side), arguments.kind, arguments.dtype, bar.update
        )
    print(f"{images} images, {found:,} instances in {arguments.out}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from jobs import show

    if arguments.images < 1:
        raise InvalidInput(f"--images {arguments.images}: expected at least 1")
    settings = settings_module.load(arguments.config)
    page, picture = show.write(settings, arguments.dataset, arguments.to, arguments.images)
    print(f"{page}\n{picture}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from cluster.storage import Storage
    from jobs import verify
    from serve_app import dataset

    storage, faults = Storage(settings_module.load(arguments.config).storage), 0
    found = dataset.open(arguments.dataset, storage)
    with tqdm(total=found.bytes(), unit="B", unit_scale=True, desc="verify", disable=None) as bar:
        for fault in verify.verify(found, bar.update):
            bar.write(fault)
            faults += 1
    rows = ", ".join(f"{found.rows(name):,} {name}" for name in dataset.SCHEMAS)
    print(f"{found.uri}: {rows} in {len(found.records)} shards, {faults or 'no'} faults")
    return 1 if faults else 0


def _compact(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from cluster.storage import Storage
    from jobs import compact
    from serve_app import dataset

    storage = Storage(settings_module.load(arguments.config).storage)
    found = dataset.open(arguments.dataset, storage)
    work = [one for job in dataset.JOBS if (one := compact.prepare(found, job))]
    for one in work:
        print(one)
    if arguments.dry_run:
        return 0
    with tqdm(total=sum(map(compact.Work.bytes, work)), unit="B", unit_scale=True, desc="compact", disable=None) as bar:
        for one in work:
            compact.run(one, bar.update)
    found = dataset.open(arguments.dataset, storage)
    for old in (compact.old(found, job) for job in dataset.JOBS):
        said = f"{old.job}: {len(old.files):,} replaced files, {old.bytes():,} bytes, and {len(old.records):,} records"
        if arguments.delete_old and len(old):
            with tqdm(total=len(old), unit="file", desc="delete", disable=None) as bar:
                old.delete(bar.update)
            print(f"{said} are deleted")
        elif len(old):
            print(f"{said} are no longer needed: --delete-old deletes them")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from cluster.storage import Storage
    from jobs import export, export_labels, export_zarr, instances
    from serve_app import dataset

    settings = settings_module.load(arguments.config)
    found, zarr = dataset.open(arguments.dataset, Storage(settings.storage)), arguments.to == "zarr"
    if zarr:
        export_zarr.check()
    elif arguments.micro_sam_model:
        raise InvalidInput("--micro-sam-model goes with --to zarr")
    if arguments.to == "zarr-labels":
        export_labels.check()
    uris = export_zarr.uris(found) if zarr else instances.uris(found)
    names, problems = export.Names(uris), 0

    def problem(text: str) -> None:
        nonlocal problems
        problems += 1
        bar.write(text)

    with tqdm(total=len(uris), unit="image", desc="export", disable=None) as bar:
        if zarr:
            model = arguments.micro_sam_model
            count = export_zarr.write(found, names, arguments.target, model, settings.limits, bar.update, problem)
        else:
            for text in export_labels.problems(found, names):
                problem(text)
            writers = {"coco": export.coco, "labels": export_labels.labels, "zarr-labels": export_labels.zarr_labels}
            count = writers[arguments.to](found, names, arguments.target, bar.update)
    print(f"{count:,} images to {arguments.target}")
    return 1 if problems else 0


def _key(arguments: argparse.Namespace) -> int:
    from cluster import keys

    secret, line = keys.make(arguments.name)
    print(f"key, shown only now:     {secret}\nline for the keys file:  {line}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from jobs import demo

    settings = settings_module.load(arguments.config)
    return demo.run(settings, serve_config.read(arguments.serve_config), arguments.to)


if __name__ == "__main__":
    sys.exit(main())
