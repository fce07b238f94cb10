"""The `t2i` command: data, tokenizer, encoding, plan, doctor, export, published weights, sampling, benchmarks, evaluation.

Training has an entry point of its own, for the launcher: `deepspeed t2i/train.py RECIPE ...`. Handlers import what they
need when they run, so that help is quick and an installation without the `eval` extra works.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional
from tyro.extras import SubcommandApp

from eval.geneval.commands import geneval
from t2i.bench.commands import bench
from t2i.doctor.commands import Doctor, doctor
from t2i.plan_command import PlanOptions, plan
from t2i.tokenizer_config import TokenizerTraining

EVAL_MODULES = ("jinja2", "matplotlib", "open_clip", "scipy", "torch_fidelity")
"""What the `eval` extra installs."""

HELP = (
    "From image-text pairs to a text-to-image model and its score. In order: data, encode, then training with "
    "`deepspeed t2i/train.py RECIPE ...`, export, sample, geneval. Before a long run: plan, doctor. "
    "Published weights: convert. Speed: bench."
)

app = SubcommandApp()
data = SubcommandApp()
tokenizer = SubcommandApp()
app.command(data, name="data", help="Make, take in and verify raw image-text sets.")


@data.command(name="shapes")
def data_shapes(
    out: Path,
    samples: int = 20_000,
    seed: int = 0,
    shard_size: int = 1000,
    workers: int = 2,
    single_object: bool = False,
    frames: int | None = None,
) -> None:
    """Make the embedded data set: pictures or clips of coloured shapes with captions and classes, as raw webdataset tars.

    Args:
        out: Folder for the tars.
        samples: Number of pictures or clips.
        seed: Another seed gives other pictures.
        shard_size: Pictures or clips a tar.
        workers: Processes.
        single_object: Pictures of one shape, whose kind is the class, for class-conditional models.
        frames: Clips of this many frames in which one shape moves; shape and direction are the class.
    """
    from data_pipeline.shapes_set import write_shards

    write_shards(out, samples, seed, shard_size, workers, single_object=single_object, frames=frames)
    print(f"{samples:,} samples in {out}; next: t2i data index {out}")


@data.command(name="index")
def data_index(folder: Positional[Path], caption_key: str = "caption", min_size: int = 16, workers: int = 2) -> None:
    """Verify every sample of a folder of tars and index the good ones; prints what was set aside and why.

    Args:
        folder: Folder of webdataset tars, raw or encoded.
        caption_key: Field of KEY.json that holds the caption where there is no KEY.txt.
        min_size: Pictures with a shorter side below this many pixels are set aside.
        workers: Processes.
    """
    from data_pipeline.index import build_index, print_table

    print_table(build_index(folder, caption_key=caption_key, min_size=min_size, workers=workers))


@data.command(name="ingest")
def data_ingest(
    source: Positional[Path],
    out: Path,
    images: Path | None = None,
    caption_field: str = "caption",
    image_field: str = "image",
    label_field: str | None = None,
    lowercase: bool = False,
    shard_size: int = 1000,
) -> None:
    """Turn a table and a folder of pictures, a folder of picture/.txt pairs, or img2dataset tars into raw tars.

    Args:
        source: A CSV, TSV, JSON, JSONL or parquet table, or a folder of pairs or of tars.
        out: Folder for the tars.
        images: Folder that the table's picture paths are relative to; the table's own when not given.
        caption_field: The table's field with the caption.
        image_field: The table's field with the picture's path.
        label_field: The table's field with a class number, for class-conditional training.
        lowercase: Lower-case the captions.
        shard_size: Pictures a tar.
    """
    from data_pipeline.ingest import ingest, print_report

    print_report(
        ingest(
            source, out, images=images, caption_field=caption_field, image_field=image_field, label_field=label_field,
            lowercase=lowercase, shard_size=shard_size,
        )
    )  # fmt: skip
    print(f"next: t2i data index {out}")


app.command(tokenizer, name="tokenizer", help="Train an image tokenizer.")


@tokenizer.command(name="train")
def tokenizer_train(config: Annotated[TokenizerTraining, tyro.conf.arg(name="")]) -> None:
    """Train the VQ image tokenizer on an indexed set; run again, it goes on where it stopped."""
    from t2i.tokenizer_training import train_tokenizer

    result = train_tokenizer(config)
    print("  ".join(f"{name} {value:.4g}" for name, value in result.items()))


@app.command(name="encode")
def encode(
    raw: Positional[Path],
    out: Path,
    image_size: int,
    tokenizer: str = "shapes",
    text_encoder: str | None = None,
    frames: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> None:
    """Encode an indexed raw set to shards of token codes, which training reads.

    Args:
        raw: Folder of raw tars, indexed.
        out: Folder for the encoded tars.
        image_size: Pixels a side; pictures are cropped to a square and resized.
        tokenizer: Folder of a tokenizer, or "shapes" for the one that is shipped.
        text_encoder: T5 encoder whose states are stored with each sample: a folder or a hub name. Leave it out where
            the text encoder is trained with the model.
        frames: Encode this many frames of animated pictures, for video models; pictures are stills when not given.
        batch_size: Pictures at once.
        device: Where to run; the first GPU or the processor when not given.
    """
    from data_pipeline.index import print_table
    from t2i.encoding import encode

    manifest = encode(
        raw, out, tokenizer=tokenizer, image_size=image_size, text_encoder=text_encoder, frames=frames,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    if manifest is not None:
        print_table(manifest)


app.command(name="plan")(PlanOptions)


@app.command(name="export")
def export(
    run: Positional[Path],
    out: Path,
    step: int | None = None,
    weights: Literal["auto", "averaged", "raw"] = "auto",
    tokenizer: str | None = None,
    text_encoder: str | None = None,
) -> None:
    """Merge a training checkpoint and everything that drawing needs into one folder of safetensors and JSON.

    Args:
        run: Folder of a training run.
        out: Folder for the export.
        step: Which checkpoint; the newest when not given.
        weights: The moving average of the weights, the raw ones of that step, or the average where there is one.
        tokenizer: Where the run's image tokenizer is now, if it has moved.
        text_encoder: Where the run's frozen text encoder is now, if it has moved.
    """
    from t2i.export import export

    pipe = export(run, out, step, weights=weights, tokenizer=tokenizer, text_encoder=text_encoder)
    print(f"step {pipe.provenance.step} of {pipe.provenance.recipe} exported to {out}")


@app.command(name="convert")
def convert(
    checkpoint: Positional[Path],
    out: Path,
    kind: Literal["nar", "raster", "warm-start"] = "nar",
    grid: tuple[int, ...] | None = None,
    n_head: int | None = None,
    n_kv_head: int | None = None,
    vq: str | None = None,
    text_encoder: str | None = None,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> None:
    """Make an export of published NAR or LlamaGen weights, which `t2i sample` and `from_pretrained` open.

    Args:
        checkpoint: File of weights (.pt, .pth, .bin, .ckpt or .safetensors); no code in it is run.
        out: Folder for the export.
        kind: What the weights are: of a NAR model, or of a raster one (LlamaGen). "warm-start" makes of raster weights a NAR
            model to be trained further.
        grid: Tokens along each axis; 16 16 for images and 4 16 16 for video when not given.
        n_head: Attention heads; those of the published model of that width when not given.
        n_kv_head: Grouped key-value heads; as many as heads when not given.
        vq: File of published VQ weights, a tokenizer's folder, or "shapes"; without one the export gives tokens and no
            pictures.
        text_encoder: T5 encoder of a text model: a folder or a hub name; google/flan-t5-xl when not given.
        guidance_scale: Guidance of the export; the published 7.5 for text, 2 for classes and 1.25 for video when not given.
        temperature: Of the export; 0 takes the likeliest token.
        top_k: Of the export: keep the k likeliest tokens; 0 keeps all.
        top_p: Of the export: keep the likeliest tokens up to this probability mass.
    """
    from t2i.convert_files import convert

    pipe = convert(
        checkpoint, out, kind=kind, grid=grid, n_head=n_head, n_kv_head=n_kv_head, vq=vq, text_encoder=text_encoder,
        guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p,
    )  # fmt: skip
    config = pipe.model.config
    print(
        f"{'raster' if config.order == 'raster' else 'NAR'} model of {sum(p.numel() for p in pipe.model.parameters()):,} "
        f"parameters, condition {config.condition}, grid {'x'.join(map(str, config.grid))}, {config.n_head} heads, "
        f"guidance {pipe.sample.guidance_scale:g}, {'no' if pipe.vq is None else 'with'} tokenizer: exported to {out}"
    )


@app.command(name="sample")
def sample(
    folder: Positional[Path],
    prompts: Positional[tuple[str, ...]],
    out: Path = Path("sample.png"),
    images: int = 4,
    seed: int = 0,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_share: float = 1.0,
    zipar_window: int | None = None,
    zipar_adaptive: bool = False,
    watch: Path | None = None,
    frame_ms: int | None = None,
    device: str | None = None,
) -> None:
    """Draw pictures or clips from an export and write them as one grid, a row for each prompt.

    Args:
        folder: An export.
        prompts: Captions, or class numbers for a class-conditional model.
        out: The picture to write. Clips of a video model play side by side in a .webp or .gif and are film strips in any
            other format.
        images: Pictures or clips of each prompt.
        seed: Of the first picture; the n-th is drawn with seed + n.
        guidance_scale: Strength of classifier-free guidance; what the export says when not given, as for the next three.
        temperature: 0 takes the likeliest token.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens up to this probability mass.
        guidance_share: Share of the passes, from the first on, that are guided.
        zipar_window: Decode a raster model with ZipAR: tokens of a row after which the next one starts.
        zipar_adaptive: Take that window as the least.
        watch: A .webp or .gif to write as well, an animation of the pictures coming into being.
        frame_ms: How long a frame of an animation is shown, in milliseconds; 250 when not given.
        device: Where to run; the first GPU or the processor when not given.
    """
    from PIL.Image import registered_extensions

    from t2i.animation import ANIMATED, Recording, save_clips
    from t2i.devices import choose_device
    from t2i.pipeline import DrawOptions, TextToImagePipeline, picture_grid

    if not prompts or images < 1:
        raise ValueError(f"{len(prompts)} prompts and {images} images of each; give at least one of both")
    if out.suffix.lower() not in registered_extensions() or out.is_dir():
        raise ValueError(f"{out} is no file name of a picture; give one such as {out.with_suffix('.png')}")
    if frame_ms is not None and frame_ms < 10:
        raise ValueError(f"frames of {frame_ms} ms are too short to be shown; give at least 10")
    pipe = TextToImagePipeline.from_pretrained(folder, choose_device(device))
    repeated = [prompt for prompt in prompts for _ in range(images)]
    if pipe.text_encoder is None:
        if not all(prompt.isdecimal() for prompt in prompts):
            raise ValueError(f"{folder} draws classes; give whole numbers, not {prompts[0]!r}")
        conditions: list[str] | list[int] = [int(prompt) for prompt in repeated]
    else:
        conditions = repeated
    if frame_ms is not None and not (pipe.draws_clips and out.suffix.lower() in ANIMATED):
        what = f"{out} is a still picture" if pipe.draws_clips else f"{folder} draws still pictures"
        raise ValueError(f"frame_ms is {frame_ms} and {what}; leave it out, or write clips of a video model to a .webp")
    options: DrawOptions = {
        "guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p, "progress": True,
        "guidance_share": guidance_share, "zipar_window": zipar_window, "zipar_adaptive": zipar_adaptive,
    }  # fmt: skip
    recording = Recording(pipe, images)
    if watch is not None:
        if watch.suffix.lower() not in ANIMATED or zipar_adaptive:
            reason = (
                "adaptive windows draw one picture after the other" if zipar_adaptive else "no animation's file name"
            )
            raise ValueError(f"cannot write {watch}: {reason}; give a .webp or .gif, and a fixed window for ZipAR")
        options |= {"watch": recording, "batch_size": len(conditions)}  # all in one, to come into being together
    out.parent.mkdir(parents=True, exist_ok=True)
    if pipe.draws_clips:
        save_clips(pipe.clips(conditions, seed, **options), out, images, 250 if frame_ms is None else frame_ms)
    else:
        picture_grid(pipe(conditions, seed, **options), columns=images).save(out)
    if watch is not None:
        recording.save(watch)
    print(f"{len(conditions)} {'clips' if pipe.draws_clips else 'pictures'} in {out}")


app.command(bench, name="bench", help="Measure decoding, training steps, the loader and a whole run of NAR-XL here.")

app.command(name="doctor")(Doctor)

app.command(geneval, name="geneval", help="GenEval: prompts, pictures, scores and report.")


@app.command(name="score-classes")
def score_classes(
    export: Positional[Path],
    out: Path | None = None,
    judge: Literal["shapes"] = "shapes",
    samples: int = 16,
    batch_size: int = 64,
    seed: int = 0,
) -> None:
    """Draw every class of a class-conditional export several times, and tell how often the class is in it.

    Args:
        export: An export of a model of the embedded data set's classes: pictures of one shape, or clips.
        out: Folder for results and samples; EXPORT/classes when not given.
        judge: Who looks at the samples: "shapes" is the exact judge of the embedded data set.
        samples: Pictures or clips of each class.
        batch_size: Pictures or clips drawn at once.
        seed: Another seed draws other samples.
    """
    from eval.classes import score_classes

    score_classes(export, out or export / "classes", judge=judge, samples=samples, batch_size=batch_size, seed=seed)


@app.command(name="evaluate")
def evaluate(
    source: Positional[Path],
    prompts: Path | None = None,
    reference: Path | None = None,
    out: Path | None = None,
    images_per_prompt: int | None = None,
    prompt_field: str | None = None,
    clip_score: bool = True,
    clip: str = "ViT-L-14",
    clip_pretrained: str = "openai",
    clip_quick_gelu: bool | None = None,
    clip_prefix: str = "",
    kid: bool = True,
    inception: Path | None = None,
    resize: Literal["clean", "tensorflow"] = "clean",
    crop_reference: bool = False,
    save_reference: Path | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    json: bool = False,
) -> None:
    """CLIPScore of an export or of pictures with prompts, and their FID and KID against a reference.

    Under a launcher the ranks share what an export draws, and the one that finishes last measures.

    Args:
        source: An export; or a folder of pictures: of GenEval's layout, with .txt captions beside them, or in the order of
            prompts.
        prompts: A .txt with a prompt a line, or a table (.csv, .tsv, .json, .jsonl, .parquet).
        reference: What pictures are compared with: a folder of pictures, or an .npz with mu and sigma, for KID with features.
        out: Folder for scores.json, clip_scores.jsonl and an export's pictures. When not given it is EXPORT/evaluate, and for
            pictures nothing is written.
        images_per_prompt: Pictures of each prompt; 1 when not given, and of GenEval's layout all there are.
        prompt_field: The table's field with the prompt; "prompt", or else "caption", when not given.
        clip_score: Compute CLIPScore where prompts are known.
        clip: open_clip's architecture of the model for CLIPScore, or local-dir:FOLDER.
        clip_pretrained: Its weights: a tag of open_clip's, or a file.
        clip_quick_gelu: Whether those weights were trained with QuickGELU. Known of a tag; a file is taken for OpenAI's where
            there are such of that architecture.
        clip_prefix: Put before each prompt; "A photo depicts " in CLIPScore as published.
        kid: Compute KID beside FID.
        inception: File of Inception's weights; from torch's cache, or fetched, when not given.
        resize: How pictures are brought to Inception's size: as clean-fid does, or as in the first FIDs.
        crop_reference: Compare with the largest central square of each picture in the folder.
        save_reference: An .npz for statistics and features of the folder, to be compared with again.
        batch_size: Pictures drawn or measured at once.
        seed: Another seed draws other pictures.
        device: Where to run; the first GPU or the processor when not given.
        json: Print scores.json in place of the table.
    """
    from eval.evaluate import ClipOptions, ReferenceOptions, evaluate
    from eval.evaluate_table import print_scores
    from eval.ranks import launched

    if reference is None and (inception is not None or save_reference is not None or crop_reference or not kid):
        raise ValueError(
            "inception, kid and a way to read the reference are given, and no reference; give one, or leave them out"
        )
    document = evaluate(
        source, prompts=prompts, prompt_field=prompt_field, out=out,
        clip=ClipOptions(clip, clip_pretrained, clip_quick_gelu, clip_prefix) if clip_score else None,
        reference=None if reference is None else ReferenceOptions(
            reference, inception, resize, crop_reference, kid, save_reference
        ),
        images_per_prompt=images_per_prompt, batch_size=batch_size, seed=seed, device=device, ranks=launched(),
    )  # fmt: skip
    if document is not None:
        print_scores(document, json)


def main() -> None:
    """Run the command line; a mistake of the user's is one line and exit code 2."""
    # Started under the DeepSpeed launcher, which puts this before everything else and also sets LOCAL_RANK.
    args = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank=")]
    try:
        # The recipe's fields, which are options of these two, depend on their first argument.
        if args[:1] == ["plan"]:
            return plan(args[1:])
        if args[:1] == ["doctor"]:
            sys.exit(doctor(args[1:]))
        app.cli(prog="t2i", args=args, description=HELP)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing half written will be used, run the same command again", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in EVAL_MODULES:
            raise
        print(f"error: evaluation needs {error.name}; install it with: pip install 'nar-t2i[eval]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
