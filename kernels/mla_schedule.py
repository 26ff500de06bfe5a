"""Which keys of which request each program of a decode takes, so that no program takes more than a fair share.

blocks[b] = min(ceil(seq_lens[b] / unit), floor(2^30 / B));  share = max(ceil(sum(blocks) / parts), least)
splits[b] = max(1, ceil(blocks[b] / share));  first[b] = splits[0] + ... + splits[b - 1]

seq_lens int32 `[B]` -> schedule int32 `[B + parts, 4]`. Row first[b] + i is the request b, its first key of split i and
the key behind its last one; no more than B + parts rows are used, and the others are -1, 0, 0. The last column is
first[0], ..., first[B], and zeros behind them. One program per request, which adds up all lengths by itself: they
are some kilobytes, and programs that wait for each other need more than a launch has.

- A request is cut evenly, not into shares and a rest.
- Its last split ends nowhere (2^31 - 1): `mla_decode` ends at the length it reads, so that a schedule made of other
  lengths is unfair and never wrong.

Source: deepseek-ai/FlashMLA, get_mla_metadata, whose shares go to a fixed number of programs, one after the other;
here each split is a program of its own, and the board's scheduler hands them out.
"""

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(seq_lens, unit, least, schedule):
    batch = seq_lens.shape[0]

    # (B,) x (B,) x ()
    seq_lens_arranged = seq_lens.tile((1,)).tile((-1,)).expand((batch,))
    seq_lens_arranged.dtype.dtype = seq_lens_arranged.dtype.dtype.squeeze(0)

    # (B,) x (B + parts, 4) x ()
    schedule_arranged = schedule.tile((1, 1)).tile((-1, -1)).squeeze(1).expand((batch,))
    schedule_arranged.dtype.dtype = schedule_arranged.dtype.dtype.squeeze((0, 1))
    return seq_lens_arranged, unit, least, schedule_arranged


# ceil(lengths / unit), of the largest int32 too, and no more than `most`
def blocks_of(lengths, unit, most):
    return ntl.minimum((ntl.maximum(lengths, 1) - 1) // unit + ntl.minimum(ntl.maximum(lengths, 0), 1), most)


def application(seq_lens, unit, least, schedule):
    request = ntl.program_id(0)
    batch = seq_lens.shape[0]
    rows = schedule.shape[0]
    parts = rows - batch

    # What no table holds may stand in seq_lens: it harms no other request, because the sum stays within int32
    most = 1073741824 // batch
    total = 0
    for start in range(0, batch, 256):
        # [256]
        lengths = seq_lens[start + ntl.arange(0, 256)]
        blocks = blocks_of(lengths, unit, most)
        total += ntl.sum(blocks)
    share = ntl.maximum((total + parts - 1) // parts, least)

    first = 0
    used = 0
    for start in range(0, batch, 256):
        other = start + ntl.arange(0, 256)
        # [256]
        lengths = seq_lens[other]
        blocks = blocks_of(lengths, unit, most)
        splits = ntl.maximum((blocks + share - 1) // share, 1)
        used += ntl.sum(ntl.where(other < batch, splits, 0))
        first += ntl.sum(ntl.where(other < request, splits, 0))

    own_blocks = blocks_of(seq_lens[request], unit, most)
    own = ntl.maximum((own_blocks + share - 1) // share, 1)
    keys = (own_blocks + own - 1) // own * unit
    for start in range(0, own, 256):
        split = start + ntl.arange(0, 256)
        # Row -1 is outside the schedule, so that the store is masked
        row = ntl.where(split < own, first + split, -1)
        schedule[row, 0] = split * 0 + request
        schedule[row, 1] = split * keys
        schedule[row, 2] = ntl.where(split < own - 1, (split + 1) * keys, 2147483647)
    schedule[request, 3] = first
    if request == batch - 1:
        schedule[batch, 3] = used

    # The rows that are left are nobody's: every B-th of them is this program's to say so; the store is masked past the
    # last one
    for start in range(0, (parts + batch - 1) // batch, 256):
        step = request + (start + ntl.arange(0, 256)) * batch
        left = used + step
        schedule[left, 0] = left * 0 - 1
        schedule[left, 1] = left * 0
        schedule[left, 2] = left * 0
        behind = batch + 1 + step
        schedule[behind, 3] = behind * 0


def premake(dtype=None):
    """`dtype` is that of other kernels' inputs, and changes nothing."""
    tensors = (
        Tensor(1, other=0, name="seq_lens"),
        Tensor(0, name="unit"),
        Tensor(0, name="least"),
        Tensor(shape=(None, 4), name="schedule"),
    )
    return arrangement, application, tensors
