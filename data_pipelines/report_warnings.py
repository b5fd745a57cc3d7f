"""What looks wrong with a data set, in plain words: thresholds over the numbers of a report."""

from data_pipelines.report_numbers import SHORT_CAPTION

MOST_REJECTED = 0.05  # of the samples
MOST_REPEATED_CAPTIONS = 0.10
MOST_SHORT_CAPTIONS = 0.05
LEAST_FILL = 0.95
MOST_IMBALANCE = 1.02
MOST_OF_ONE_SHAPE = 0.8  # of the tokens, where there are several shapes
MOST_UNUSED_HOURS = 0.5
MOST_SLOW = 0.05  # of the samples, with fewer frames a second than data.fps
LEAST_TOKENS = 0.1  # of those that the videos have
MOST_DUPLICATES = 0.01
MOST_REPEATED_ROWS = 0.1
FEW_ROWS = 30
MANY_EPOCHS = 100


def problem(text):
    return dict(level="problem", text=text)


def warning(text):
    return dict(level="warning", text=text)


def note(text):
    return dict(level="note", text=text)


def find_warnings(numbers, arrays):
    """Warnings of a report, the gravest first: dicts of level ("problem", "warning", "note") and text.

    A problem stops training or leaves nothing to train on; a warning costs quality or money; a note is for the record.
    Args: as an `Analysis` has them.
    """
    found = [
        *_of_samples(numbers),
        *_of_index(numbers),
        *_of_packing(numbers),
        *_of_captions(numbers),
        *_of_shapes(numbers, arrays),
    ]
    order = ("problem", "warning", "note")
    return sorted(found, key=lambda one: order.index(one["level"]))


def _of_samples(numbers):
    totals, duplicates, refused = numbers["totals"], numbers["duplicates"], numbers["refused_by_training"]
    if not totals["kept"]:
        yield problem("No sample is left to train on: see the reasons under Rejected.")
    if refused:
        yield problem(
            f"{_samples(refused)} fit in no row, so training would stop at its start: raise data.row_tokens or "
            "data.row_text, lower data.max_tokens, or shorten the captions."
        )
    rejected = totals["rejected"] - refused
    share = rejected / max(totals["samples"], 1)
    if share > MOST_REJECTED:
        yield warning(
            f"{_percent(share)} of the samples are rejected ({rejected:,} of {totals['samples']:,}): mend or remove "
            "them, or check that the limits are meant."
        )
    elif rejected:
        yield note(f"{_samples(rejected)} rejected ({_percent(share)}).")
    if duplicates["groups"]:
        extra = duplicates["samples"] - duplicates["groups"]
        say = warning if extra > MOST_DUPLICATES * totals["kept"] else note
        groups = "a group" if duplicates["groups"] == 1 else f"{duplicates['groups']:,} groups"
        yield say(f"{_samples(extra)} too many: {groups} of files with equal bytes (listed under Duplicates).")


def _of_index(numbers):
    settings, limit = numbers["settings"], numbers["source"]["limits"].get("max_seconds")
    fps, frames = settings["data.fps"], settings["data.max_frames"]
    if limit and fps and (frames - 1) / fps > limit:
        yield warning(
            f"The index looks {limit:g} s into a video, but clips of data.max_frames {frames} at data.fps {fps:g} last "
            f"{(frames - 1) / fps:.1f} s: index again with a larger limit, or lower data.max_frames."
        )


def _of_packing(numbers):
    packing, settings = numbers["packing"], numbers["settings"]
    if packing is None:
        return
    planned = next(line for line in packing["by_ranks"] if line["ranks"] == settings["ranks"])
    rows, steps = planned["rows_per_epoch"] - planned["repeated_rows"], settings["train.steps"]
    if packing["fill"] < LEAST_FILL:
        yield warning(f"Rows are only {_percent(packing['fill'])} full: {_why_not_full(packing, rows)}.")
    if 2 * packing["most_text"] < settings["data.row_text"]:
        yield note(
            f"No row needs more than {packing['most_text']:,} of its {settings['data.row_text']:,} text slots: a "
            "smaller data.row_text saves memory and time."
        )
    if planned["imbalance"] > MOST_IMBALANCE:
        yield warning(
            f"Ranks wait for each other: a step takes {planned['imbalance']:.3f} times what it would with equal cost "
            "on all ranks. More rows a rank and step (data.batch), or samples of less different size, help."
        )
    if planned["repeated_rows"] > MOST_REPEATED_ROWS * rows:
        yield warning(
            f"{planned['repeated_rows']:,} of the {planned['rows_per_epoch']:,} rows of an epoch are repeated to fill "
            "its last step: a smaller data.batch, or more data, repeats fewer."
        )
    if planned["epochs"] and planned["epochs"] > MANY_EPOCHS:
        yield warning(
            f"train.steps = {steps:,} goes through the data {planned['epochs']:,.0f} times: the model may learn it by "
            "heart."
        )
    elif planned["epochs"] and planned["epochs"] < 1:
        yield note(f"train.steps = {steps:,} sees {_percent(planned['epochs'])} of the rows, the others never.")


def _why_not_full(packing, rows):
    if packing["limited_by_segments"] > 0.2:
        share = _percent(packing["limited_by_segments"])
        return f"{share} of them stop at data.max_segments samples; raise it"
    if packing["limited_by_text"] > 0.2:
        share = _percent(packing["limited_by_text"])
        return f"in {share} of them the text is full before the video; raise data.row_text"
    if rows < FEW_ROWS:
        return "there are few, and the last ones are seldom full; more data or a smaller data.row_tokens fills them"
    return "the samples leave gaps that no other fills; a larger data.row_tokens leaves fewer"


def _of_captions(numbers):
    captions, n = numbers["captions"], max(numbers["totals"]["kept"], 1)
    if captions["repeated"] > MOST_REPEATED_CAPTIONS * n:
        yield warning(f"{_percent(captions['repeated'] / n)} of the samples share their caption with another.")
    if captions["empty"]:
        yield warning(f"{_samples(captions['empty'])} have an empty caption.")
    short = captions["short"] - captions["empty"]
    if short > MOST_SHORT_CAPTIONS * n:
        share = _percent(short / n)
        yield warning(f"{_samples(short)} ({share}) have a caption of fewer than {SHORT_CAPTION} characters.")
    if captions["estimated"]:
        yield note(
            f"Text tokens are an estimate: {captions['tokenised']:,} of {captions['different']:,} different captions "
            "were tokenised, each of the others is counted as one of equally many characters."
        )


def _of_shapes(numbers, arrays):
    n = max(len(arrays.rows), 1)
    enlarged = int(((arrays.height > arrays.own_height) | (arrays.width > arrays.own_width)).sum())
    if enlarged:
        yield warning(f"{_samples(enlarged)} are enlarged, which adds no detail.")
    slower = int((arrays.video & (arrays.fps > 1.05 * arrays.own_fps)).sum())
    if slower:
        say = warning if slower > MOST_SLOW * n else note
        yield say(
            f"{_samples(slower)} have fewer frames a second than data.fps: frames are repeated, and motion stutters."
        )
    listed = numbers["shapes"]["listed"]
    largest = max(listed, key=lambda shape: shape["share_tokens"], default=None)
    if len(listed) > 1 and largest["share_tokens"] > MOST_OF_ONE_SHAPE:
        share, size = _percent(largest["share_tokens"]), f"{largest['width']}x{largest['height']}"
        yield note(f"One shape has {share} of all video tokens: {largest['num_frames']} frames of {size}.")
    before, after = float(arrays.own_seconds.sum()), float(arrays.seconds.sum())
    if before and after < (1 - MOST_UNUSED_HOURS) * before:
        yield warning(
            f"{_percent(1 - after / before)} of the length of the kept videos is never seen, since only the beginning "
            "of a long video is used: raise data.max_frames, or cut long videos into clips."
        )
    tokens, native = int(arrays.tokens.sum()), int(arrays.native_tokens.sum())
    if tokens < LEAST_TOKENS * native:
        yield note(
            f"The limits keep {_percent(tokens / native)} of the tokens that the videos have at their own size and "
            "length."
        )


def _samples(count):
    return f"{count:,} sample{'' if count == 1 else 's'}"


def _percent(share):
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.2g} %"
