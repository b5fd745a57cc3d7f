"""What a captioner learns: to write the captions of videos, word by word, from their pixels or latents; or, from
captions of one kind, those of another.

In stages, as DALL-E 3's captioner (Betker et al. 2023): `data.stages`, dicts of `steps`, a `caption_mix` and perhaps a
`row_text`, come first, such as short captions; then the mix of the `data` section, such as detailed ones.
"""

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data_pipelines.caption_examples import Rewritings, WholePatches
from data_pipelines.caption_kinds import CAPTION, check_mix, parse_mix
from data_pipelines.latent_shards import is_shards
from data_pipelines.loader import make_loader
from data_pipelines.packing import token_costs
from data_pipelines.rows import RowSource
from data_pipelines.sources import open_source
from data_pipelines.survey import MAX_CAPTIONS, some_captions
from data_pipelines.text_tokens import MAX_TOKENS, Tokenizer
from data_pipelines.world import World
from sorax import config as config_lib
from sorax import flops, functional, processes, read_weights, runlog, sharding
from sorax.attention import attention
from sorax.caption_scores import score_captions
from sorax.caption_writer import CaptionWriter, as_inputs, load_captioner, order, pixel_grid
from sorax.captioner import Captioner, CaptionerConfig
from sorax.decoding import DecodingConfig
from sorax.dit_data import First, held_out_source, prepare_data
from sorax.encode import Codec
from sorax.errors import UserError
from sorax.objectives import DataConfig, EvalConfig, Objective, check_path, loader_options, write_samples
from sorax.optim import OptimConfig
from sorax.runs import open_vae, vae_folder
from sorax.text import PAD_ID

CAPTIONS_A_WORD = 32  # samples that a tokenizer is trained on, for each word of its vocabulary


def captioner_objective(config, workdir: str, mesh) -> Objective:
    """Cross-entropy of every word of packed captions. Parameters: dict(captioner=)."""
    from sorax.train import TrainConfig, compute_dtype

    model = config_lib.build(CaptionerConfig, config.model, "model")
    data = config_lib.build(DataConfig, config.data, "data")
    settings = config_lib.build(TrainConfig, config.train, "train")
    evaluation = config_lib.build(EvalConfig, config.eval, "eval")
    check_path(data)
    _check_mesh(data, model, mesh)
    dtype = compute_dtype(settings.dtype, mesh.devices.flat[0].platform)
    stages = _stages(data, model.kinds, settings.steps)
    ranks = data.ranks or sharding.batch_parts(mesh)
    cost_a, cost_b = token_costs(model.width, model.ffn_dim)
    found = _prepare(config, data, model, workdir)

    def rows_of(examples, mix, seed, row_text=data.row_text):
        return RowSource(
            examples, seed=seed, mix=mix, kinds=model.kinds, row_tokens=data.row_tokens, row_text=row_text,
            max_segments=data.max_segments, patch_size=model.patch_size, order=order(model), batch_size=data.batch,
            ranks=ranks, cost_a=cost_a, cost_b=cost_b, oversize="trim" if data.oversize == "trim" else "refuse",
        )  # fmt: skip

    rows = [(end, rows_of(found.examples, mix, settings.seed, row_text)) for end, mix, row_text in stages]
    val_rows = {kind: rows_of(found.val_examples, {kind: 1.0}, 0) for kind in stages[-1][1]}

    graph = functional.abstract(Captioner, model)[0]
    attend, attend_text = sharding.attention_on(mesh, attention)
    constrain = sharding.activation_constraint(mesh)
    options = dict(attend=attend, attend_text=attend_text, constrain=constrain, remat=settings.remat,
                   unroll=settings.unroll)  # fmt: skip

    def loss(params, batch, key, step, constants):
        params = functional.cast(params["captioner"], dtype)
        logits = nnx.merge(graph, params)(
            as_inputs(batch["tokens"], dtype), batch["positions"], batch["segment_ids"], batch["text_tokens"],
            batch["text_segment_ids"], batch["text_kinds"], **options,
        )  # fmt: skip
        words = batch["text_tokens"]
        told = (words != PAD_ID).astype(jnp.float32)
        chosen = jnp.sum(jax.nn.one_hot(words, model.vocab_size, dtype=jnp.float32) * jax.nn.log_softmax(logits), -1)
        right = (jnp.argmax(logits, axis=-1) == words) * told
        sums = dict(loss=(-jnp.sum(chosen * told), jnp.sum(told)), accuracy=(jnp.sum(right), jnp.sum(told)))
        for number, kind in enumerate(model.kinds):
            own = told * (batch["text_kinds"] == number)
            sums[f"loss_{kind}"] = (-jnp.sum(chosen * own), jnp.sum(own))
        return sums

    validation = jax.jit(lambda params, batch: loss(params, batch, None, None, {}))

    def start(params):
        if not config.get("init"):
            return params
        there = load_captioner(config.init)
        wanted = jax.tree.map(lambda x: x.shape, params["captioner"])
        if there.writer.config != model or jax.tree.map(np.shape, there.writer.params) != wanted:
            raise UserError(f"config.init {config.init!r} is of another architecture: make config.model the same")
        return dict(captioner=read_weights.place(there.writer.params, params["captioner"]))

    def evaluate(state, step, folder):
        metrics = {}
        for kind, source in val_rows.items():
            batch = sharding.put_batch(next(make_loader(source, **loader_options(mesh))), mesh)
            sums = validation(state.ema_params, batch)
            metrics[f"val_loss_{kind}"] = float(sums["loss"][0] / sums["loss"][1])
        metrics["val_loss"] = float(np.mean(list(metrics.values())))
        params = processes.whole(state.ema_params["captioner"])
        if not processes.is_first():
            return metrics, {}, 1.0
        writer = CaptionWriter(model, params, found.tokenizer, found.codec)
        return metrics | _look(writer, found, evaluation, data.row_text, step, folder), {}, 1.0

    def batches(step):
        for end, source in rows:
            if step < end:
                loader = make_loader(source, start_step=step, num_workers=data.workers, **loader_options(mesh))
                yield from itertools.islice(loader, end - step)
                loader.close()
                step = end

    before = [(end, source.identity) for end, source in rows[:-1]]
    return Objective(
        name="captioner" if model.reads != "text" else "expander",
        identity="-".join([rows[-1][1].identity, found.identity, *(f"{end}:{name}" for end, name in before)]),
        init=lambda key: dict(captioner=functional.init(Captioner, model, key)),
        loss=loss,
        batches=batches,
        work=lambda batch: flops.captioner_work(model, batch),
        evaluate=evaluate,
        start=start,
        optims={"": config_lib.build(OptimConfig, config.optim, "optim")},
    )


def _check_mesh(data, model, mesh):
    here = sharding.batch_parts(mesh)
    if data.batch % here:
        raise UserError(f"config.data.batch is {data.batch} rows, which {here} data-parallel ranks cannot share "
                        "equally: make it a multiple, or set mesh.data x mesh.fsdp to a divisor of it")  # fmt: skip
    sharding.check_rows(mesh, model.num_heads, data.row_tokens)
    if data.row_text % mesh.shape["context"]:
        raise UserError(f"rows of {data.row_text} text tokens cannot be split over context={mesh.shape['context']}: "
                        "make config.data.row_text a multiple of config.mesh.context")  # fmt: skip


def _stages(data, kinds, steps):
    """(last step, not included; mix of captions; room for them in a row) of each stage."""
    stages, end = [], 0
    for number, stage in enumerate(data.stages):
        where = f"config.data.stages[{number}]"
        stage = dict(stage) if hasattr(stage, "items") else {}
        count, mix = stage.pop("steps", None), parse_mix(stage.pop("caption_mix", ""))
        row_text = stage.pop("row_text", data.row_text)
        if stage or not mix or not all(isinstance(n, int) and n > 0 for n in (count, row_text)):
            raise UserError(f"{where} of a captioner: give a dict of `steps`, at least 1, a `caption_mix` and, if it "
                            "differs, `row_text`")  # fmt: skip
        end += count
        stages.append((end, mix, row_text))
    stages.append((max(steps, end), parse_mix(data.caption_mix) or {CAPTION: 1.0}, data.row_text))
    for _, mix, _ in stages:
        for kind in mix:
            if kind not in kinds:
                raise UserError(f"config.data.caption_mix has {kind!r}, but config.model.kinds are {', '.join(kinds)}: "
                                "add it there")  # fmt: skip
    return stages


# --- Data


@dataclasses.dataclass(frozen=True)
class _Found:
    """Examples to learn from and to look at; val_source: the videos (or captions) behind the latter."""

    examples: object
    val_examples: object
    val_source: object
    tokenizer: Tokenizer
    codec: Codec | None
    identity: str


def _prepare(config, data, model: CaptionerConfig, workdir: str) -> _Found:
    wanted = dict.fromkeys((*model.kinds, *([data.reads] if model.reads == "text" else ())))
    section = config.data.copy_and_resolve_references()
    with section.unlocked():
        # The world has those kinds that are asked for.
        section.caption_mix = ",".join(f"{kind}:1" for kind in wanted if kind != CAPTION)
    if model.reads == "latents":
        return _latents(config, section, data, model, workdir)
    if is_shards(data.path):
        raise UserError(f"config.data.path is {data.path}, but config.model.reads is {model.reads!r}: set it to "
                        "latents, and config.vae.path to their VAE")  # fmt: skip
    index = dict(index_cache=os.path.join(workdir, "index"), index_progress=runlog.reporter("index"))
    grid = pixel_grid(model.patch_size) | index
    with processes.first_before_others("captioner: data"):
        source, held_out = open_source(section, **grid), held_out_source(section, num_samples=data.val_samples, **grid)
        tokenizer = _tokenizer(config, source, model.vocab_size, workdir)
    check_mix(dict.fromkeys(model.kinds), getattr(source, "caption_kinds", ()))
    held_out = First(held_out, data.val_samples)

    def examples(source):
        if model.reads == "text":
            return Rewritings(source, tokenizer.encode, data.reads)
        return WholePatches(source, tokenizer.encode, model.patch_size)

    found = examples(source)
    identity = f"{found.identity}-{tokenizer.identity}" + (f"-{data.reads}" if model.reads == "text" else "")
    return _Found(found, examples(held_out), held_out, tokenizer, None, identity)


def _latents(config, section, data, model, workdir):
    if not config.vae.get("path"):
        raise UserError("config.model.reads is 'latents', but config.vae.path is empty: set it to the run of a VAE")
    vae_config, vae_params, vae_identity = open_vae(vae_folder(config, workdir))
    if vae_config.latent_channels != model.in_channels:
        raise UserError(f"config.model takes {model.in_channels} channels, but the VAE makes "
                        f"{vae_config.latent_channels}: make them equal")  # fmt: skip
    codec, given = Codec(vae_config, vae_params), config.copy_and_resolve_references()
    multiple = vae_config.spatial_stride * model.patch_size[1]
    grid = dict(spatial_multiple=multiple, temporal_stride=vae_config.temporal_stride)
    with given.unlocked():
        given.text = dict(vocab_size=model.vocab_size)
        given.data, given.init = section, ""
        if not is_shards(data.path):
            with processes.first_before_others("captioner: tokenizer"):
                index = dict(index_cache=os.path.join(workdir, "latents", "index"))
                _tokenizer(config, open_source(section, **grid, **index), model.vocab_size, workdir)
            given.data.tokenizer = workdir
    tokenizer, examples, val_examples = prepare_data(given, workdir, codec, vae_identity)
    check_mix(dict.fromkeys(model.kinds), getattr(examples, "kind_lengths", {}))
    held_out = None
    if not is_shards(data.path) and not data.mixture:
        held_out = First(held_out_source(section, num_samples=data.val_samples, **grid), data.val_samples)
    return _Found(examples, val_examples, held_out, tokenizer, codec, examples.identity)


def _tokenizer(config, source, vocab_size, workdir):
    """That of the run folder, of config.init, or of config.data.tokenizer; else BPE, trained on captions of all kinds
    of the source: a word is a token, and words are what takes time to write."""
    wanted = config.data.get("tokenizer") or ""
    wanted = config.init if config.get("init") and wanted in ("", "bpe") else wanted
    if Tokenizer.is_in(workdir):
        return Tokenizer.load(workdir, vocab_size)
    if wanted in ("", "bpe"):
        most = min(MAX_CAPTIONS, CAPTIONS_A_WORD * vocab_size)
        tokenizer = Tokenizer.train(some_captions(source, most), vocab_size)
    else:
        tokenizer = Tokenizer.of_bytes() if wanted == "bytes" else Tokenizer.load(wanted, vocab_size)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"config.data.tokenizer has {tokenizer.vocab_size} tokens, but config.model.vocab_size is "
                        f"{vocab_size}: set it to at least that")  # fmt: skip
    if processes.is_first():
        tokenizer.save(workdir)
    return tokenizer


# --- A look at what it writes


def _look(writer, found, evaluation, row_text, step, folder):
    """Metrics of captions of the first validation samples, which are shown; of the world, how many are right."""
    source, kinds, metrics = found.val_source, writer.config.kinds, {}
    if source is None:
        return metrics
    is_world = isinstance(source.source, World)
    count = min(len(source), max(evaluation.num_videos, evaluation.num_prompts if is_world else 0))
    if not count:
        return metrics
    settings, texts = DecodingConfig("greedy", max_tokens=min(MAX_TOKENS, row_text)), {}
    if writer.config.reads == "text":
        read = [source.captions(i).get(found.examples.reads) or source.spec(i).caption for i in range(count)]
    else:
        read = [source[i]["video"] for i in range(count)]
    for kind in kinds:
        texts[kind] = writer.captions(read, kind, settings)
        if is_world and writer.config.reads != "text":
            table = score_captions(source.source, range(count), texts[kind], kind)
            metrics |= {f"{kind}_{name}": cell["value"] for name, cell in table.items() if cell["n"]}
    shown = range(min(count, evaluation.num_videos))
    lines = [" | ".join(texts[kind][i] for kind in kinds) for i in shown]
    if writer.config.reads == "text":
        os.makedirs(folder, exist_ok=True)
        text = "".join(f"{read[i]}\n    {line}\n" for i, line in zip(shown, lines))
        config_lib.write_atomic(os.path.join(folder, f"step_{step:07d}.txt"), text)
    elif shown:
        write_samples(folder, step, [read[i] for i in shown], lines)
    return metrics
