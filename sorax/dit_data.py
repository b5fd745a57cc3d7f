"""What a DiT is trained on: the VAE, the tokenizer, and latents, encoded in process or by `sorax encode` beforehand."""

import os

from data_pipelines.caption_kinds import PREFIX as CAPTIONS
from data_pipelines.caption_kinds import behind, check_mix, is_captioned, parse_mix
from data_pipelines.latent_shards import LatentShards, is_shards, read_manifest, shards_folder
from data_pipelines.mixture import MixtureExamples, part_sections
from data_pipelines.sources import GENERATED, open_source
from data_pipelines.survey import survey
from data_pipelines.text_tokens import BPE, TOKENIZER_FILE, Tokenizer
from sorax import processes
from sorax.encode import Codec, encode_source
from sorax.errors import UserError
from sorax.runlog import reporter
from sorax.runs import open_vae, start_tokenizer, vae_folder
from sorax.text_embeds import FrozenText

LATENTS = "latents"  # folder of a run
# Keys of a `data` section that say where its videos are: what the VAE takes from the DiT's if it names no path.
_PLACE = ("path", "index", "mixture", "split", "data_dir", "video_key", "caption_key", "val_path", "val_split")


def prepare_vae(config, workdir: str):
    """(config, params, identity) of the VAE that a DiT experiment asks for; trained first if it is not there."""
    from sorax.train import train

    folder = vae_folder(config, workdir)
    if not config.vae.get("path"):
        if any(map(is_shards, _paths(config.data))):
            raise UserError("config.vae.path is empty, but config.data names latent shards: set it to the run of the "
                            "VAE that they were encoded with")  # fmt: skip
        experiment = config.vae.copy_and_resolve_references()
        if not experiment.data.path and not experiment.data.get("mixture"):
            with experiment.unlocked():
                experiment.data.update({name: config.data[name] for name in _PLACE if name in config.data})
        train(experiment, folder, title="1/2 VAE")
    return open_vae(folder)


def prepare_data(config, workdir: str, codec: Codec, vae_identity: str):
    """(tokenizer, training examples, validation examples) of a DiT experiment, made in its run folder if need be.

    Training rows are the same whether the latents were encoded before (`data.path` "shards:FOLDER") or are encoded
    now, into `workdir/latents`.

    Raises:
        UserError: the data cannot be used, or was encoded with another VAE or tokenizer.
    """
    out, paths = os.path.join(workdir, LATENTS), _paths(config.data)
    if not any(map(is_shards, paths)):
        return _encode_splits(config, codec, vae_identity, out, workdir, workdir, replace=True)
    tokenizer = _tokenizer_of_shards(shards_folder(paths[0]), workdir, config.text.vocab_size)
    wanted = start_tokenizer(config, workdir)
    if not _is_wanted(tokenizer, wanted, config.text.vocab_size):
        raise UserError(f"{paths[0]} was encoded with another tokenizer ({tokenizer.file}) than {wanted!r}, which "
                        "config.data.tokenizer or the weights of config.init ask for: encode it again with --tokenizer "
                        f"{wanted}")  # fmt: skip
    text = FrozenText(config, workdir) if config.data.get("text_embeds") else None
    examples = _open_shards(config.data, vae_identity, text)
    val_examples = _validation(config, codec, vae_identity, tokenizer, out, shards_folder(paths[0]), text, (),
                               replace=True)  # fmt: skip
    return tokenizer, examples, val_examples


def _encode_splits(config, codec, vae_identity, out, folder, workdir, *, num_shards=0, replace=False):
    """As `prepare_data`, of videos, into the folder `out`; the tokenizer is kept in `folder`."""
    text = FrozenText(config, workdir) if config.data.get("text_embeds") else None
    with processes.first_before_others("encode: data"):  # the index and the tokenizer are made once
        source = open_source(config.data, **grid(codec.config, config.model.patch_size), **_index_options(out))
        check_mix(parse_mix(config.data.get("caption_mix")), getattr(source, "caption_kinds", ()))
        found = survey(source)
        wanted = start_tokenizer(config, workdir)
        tokenizer = prepare_tokenizer(found.captions, config.text.vocab_size, folder, wanted)
    examples = encode_source(codec, source, tokenizer, out, "train", vae_identity, found=found, replace=replace,
                             num_shards=num_shards, origin=_origin(config.data), text=text,
                             workers=config.data.get("workers", 0))  # fmt: skip
    val_examples = _validation(config, codec, vae_identity, tokenizer, out, out, text,
                               getattr(source, "caption_kinds", ()), replace=replace)  # fmt: skip
    return tokenizer, examples, val_examples


def encode_experiment(config, vae_run: str, out: str, *, num_shards: int = 0, tokenizer: str = "") -> None:
    """Writes the latents of a DiT experiment's data to a folder, for `data.path` "shards:FOLDER" of this or another.

    Args:
        vae_run: where the VAE is, as `open_vae` takes it; "" for config.vae.path.
        tokenizer: in place of config.data.tokenizer.

    Raises:
        UserError: the data or the VAE cannot be used, or the folder holds something else.
    """
    if config.get("kind") != "dit":
        raise UserError(f"config.kind is {config.get('kind')!r}: latents are encoded for a DiT, name its experiment")
    if not any(_paths(config.data)):
        raise UserError("config.data.path is empty: set --config.data.path=FOLDER (videos with captions), or =world")
    if any(map(is_shards, _paths(config.data))):
        raise UserError(f"config.data.path {config.data.path!r} is encoded already: name the videos")
    vae_run = vae_run or config.vae.get("path")
    if not vae_run:
        raise UserError("no VAE to encode with: name its run with --vae or config.vae.path")
    vae_config, vae_params, vae_identity = open_vae(vae_run)
    if tokenizer:
        config = config.copy_and_resolve_references()
        with config.data.unlocked():
            config.data.tokenizer = tokenizer
    _encode_splits(config, Codec(vae_config, vae_params), vae_identity, out, out, "", num_shards=num_shards)


def grid(vae_config, patch_size) -> dict:
    """What videos must be multiples of, in the words of `open_source`."""
    return dict(spatial_multiple=vae_config.spatial_stride * patch_size[1], temporal_stride=vae_config.temporal_stride)


def _index_options(out: str) -> dict:
    """Where an index that has to be made is kept and how it is reported, in the words of `open_source`."""
    return dict(index_cache=os.path.join(out, "index"), index_progress=reporter("index"))


def held_out_source(data, split: str = "test", **overrides):
    """What validation looks at: `val_path` and `val_split`, else the world's own split, else the training data."""
    if data.get("val_path") or data.get("val_split"):
        section = dict(data, mixture=(), path=data.get("val_path") or data.path)
        section["index"] = ""  # it is the training data's
        section["split"] = data.get("val_split") or data.get("split", "")
        if overrides.get("index_cache"):
            overrides["index_cache"] += "_val"
        data = section
    return open_source(_of_world(data), split=split, **overrides)


def _of_world(data):
    """Captions that were written for the world are those of its training split: any other has its own."""
    section = behind(data)
    return section if section is not data and (section.get("path") or "world") == "world" else data


def prepare_tokenizer(captions, vocab_size: int, folder: str, wanted: str = "") -> Tokenizer:
    """The tokenizer of a folder, of at most vocab_size tokens; made and saved if none is there.

    Args:
        captions: to train one on, if need be.
        wanted: see `Tokenizer.wanted`; "" is that of the folder if it has one.

    Raises:
        UserError: a file is broken or has more tokens, the folder has another tokenizer than the wanted one, or
            vocab_size is too small.
    """
    if Tokenizer.is_in(folder):
        tokenizer = Tokenizer.load(folder, vocab_size)
        if not _is_wanted(tokenizer, wanted, vocab_size):
            raise UserError(f"{folder} has another tokenizer ({tokenizer.file}) than {wanted!r}, which config.data."
                            "tokenizer or the weights of config.init ask for: use another folder")  # fmt: skip
        return tokenizer
    tokenizer = Tokenizer.wanted(wanted, captions, vocab_size)
    if processes.is_first():
        tokenizer.save(folder)
    return tokenizer


def _is_wanted(tokenizer, wanted, vocab_size):
    """Whether a tokenizer that is there is what `start_tokenizer` names: "" leaves it open, and "bpe" when and on which
    captions it was trained."""
    if wanted == BPE:
        return tokenizer.file == TOKENIZER_FILE
    return wanted == "" or tokenizer.identity == Tokenizer.wanted(wanted, (), vocab_size).identity


def _validation(config, codec, vae_identity, tokenizer, out, train_folder, text, kinds, *, replace):
    """Latents that validation looks at: of `val_path`, of the training data's own second part, or its first samples."""
    data, most = config.data, config.data.get("val_samples", 64)
    if is_shards(data.get("val_path")):
        examples = open_split(shards_folder(data.val_path), ("val", "train"), vae_identity, text, first=most)
        if examples.metadata["tokenizer"] != tokenizer.identity:
            raise UserError(f"{data.val_path} was encoded with another tokenizer than the training data: encode it "
                            "again with --tokenizer")  # fmt: skip
        return examples
    is_drawn = (behind(data).get("path") or "world") in GENERATED and not data.get("mixture")
    if data.get("val_path") or data.get("val_split") or is_drawn:
        limits = grid(codec.config, config.model.patch_size)
        with processes.first_before_others("encode val: data"):
            source = held_out_source(data, num_samples=most, **limits, **_index_options(out))
        return encode_source(codec, First(source, most), tokenizer, out, "val", vae_identity, replace=replace,
                             origin=_origin(data), title="encode val", text=text, kinds=kinds)  # fmt: skip
    return open_split(train_folder, ("val", "train"), vae_identity, text, first=most)


class First:
    """The first samples of a source."""

    def __init__(self, source, most):
        self.source, self.most = source, most

    def __len__(self):
        return min(self.most, len(self.source))

    @property
    def caption_kinds(self):
        return getattr(self.source, "caption_kinds", ())

    def captions(self, i):
        return self.source.captions(i)

    def spec(self, i):
        return self.source.spec(i)

    def __getitem__(self, i):
        return self.source[i]


def _open_shards(data, vae_identity, text):
    """Examples of `data.path`, or of all parts of `data.mixture`, which are latent shards."""
    if not data.get("mixture"):
        return open_split(shards_folder(data.path), ("train",), vae_identity, text)
    sections, weights = part_sections(data)
    if not all(is_shards(section["path"]) for section in sections):
        raise UserError("config.data.mixture has latent shards beside videos: encode the videos too, with --tokenizer, "
                        "or mix the videos alone")  # fmt: skip
    folders = [shards_folder(section["path"]) for section in sections]
    parts = [open_split(folder, ("train",), vae_identity, text) for folder in folders]
    for part, folder in zip(parts, folders):
        if part.metadata["tokenizer"] != parts[0].metadata["tokenizer"]:
            raise UserError(f"{folder} was encoded with another tokenizer than {folders[0]}: encode it again with "
                            f"--tokenizer {folders[0]}")  # fmt: skip
    return MixtureExamples(parts, weights)


def open_split(folder, names, vae_identity, text=None, first=None) -> LatentShards:
    """The first of several splits that a folder of shards has, with embeddings of its captions if there is a `text`
    encoder that they are of. Raises UserError if they are of another VAE or text encoder."""
    split = next((name for name in names if os.path.exists(os.path.join(folder, f"{name}.json"))), names[-1])
    metadata = read_manifest(folder, split)["metadata"]
    there = metadata["vae"]["identity"]
    if there != vae_identity:
        raise UserError(f"{folder} holds latents of the VAE {there}, but config.vae is {vae_identity}: set "
                        "config.vae.path to the run they were encoded with, or encode again")  # fmt: skip
    if text is not None:
        there = metadata.get("text", {}).get("identity")
        if there is None:
            raise UserError(f"{folder} holds no embeddings of captions, which config.data.text_embeds asks for: encode "
                            "it again with --config.data.text_embeds=true, or leave that out")  # fmt: skip
        if there != text.identity:
            raise UserError(f"{folder} holds embeddings of the text encoder {there}, but that of config.init is "
                            f"{text.identity}: set config.init to what they were encoded with, or encode again")
    return LatentShards(folder, split, first=first, text_embeds=text is not None)


def _tokenizer_of_shards(folder, workdir, vocab_size):
    """The tokenizer of latent shards, kept in the run folder too."""
    if not os.path.isdir(folder):
        raise UserError(f"no folder {folder} of latents: name one that `sorax encode --out` wrote")
    tokenizer = Tokenizer.load(folder, vocab_size)
    if Tokenizer.is_in(workdir):
        if Tokenizer.load(workdir).identity != tokenizer.identity:
            raise UserError(f"{workdir} has another {tokenizer.file} than the latents in {folder}: use another workdir")
    elif processes.is_first():
        tokenizer.save(workdir)
    return tokenizer


def _paths(data):
    """All paths of training data that a `data` section names."""
    if data.get("mixture"):
        return [section["path"] for section in part_sections(data)[0]]
    return [data.get("path") or ""]


def _origin(data):
    """A `data` section as JSON can hold it, with folders that can be found from anywhere."""
    section = data.to_dict() if hasattr(data, "to_dict") else dict(data)

    def absolute(path):
        kind = CAPTIONS if is_captioned(path) else ""
        folder = str(path or "").removeprefix(kind)
        return kind + os.path.abspath(folder) if folder and os.path.isdir(folder) else path

    section["path"] = absolute(section.get("path"))
    section["mixture"] = [dict(part, path=absolute(part["path"])) for part in section.get("mixture") or ()]
    return section
