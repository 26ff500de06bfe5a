"""Joins the splits of `mla_decode`: softmax over the union of disjoint sets of keys.

lse = log sum_i exp(part_lse[i]);  out = sum_i exp(part_lse[i] - lse) part[i]

part float32 `[B, num_splits, s_q * H, C]`, part_lse float32 `[B, num_splits, s_q, H]`, seq_lens int32 `[B]` -> out
`[B, s_q, H, C]`, lse float32 `[B, s_q, H]` (any strides). Only the splits that hold keys are read; their number follows
from seq_len as it does in `mla_decode`. `planned`: part is `[n, 1, s_q * H, C]`, part_lse `[n, 1, s_q, H]`, and which
of them are a request's stands in the last column of schedule int32 `[n, 4]`, as `mla_schedule` writes it; a request
that is not cut has its out already. Otherwise schedule is any int32 `[., .]` that is not looked at. One program per
row: a loop over the splits with the row in registers, so that no two-dimensional tile is reduced over its first axis,
which not every compiler can do.

Source: arXiv 2205.14135, section 3.1.
"""

import ninetoothed.language as ntl
from ninetoothed import Tensor


def arrangement(part, part_lse, seq_lens, schedule, least, planned, block_n, out, lse):
    batch = seq_lens.shape[0]
    latent = part.shape[3]

    # (B, rows) x (B or n, splits or 1) x (C,)
    part_arranged = part.tile((1, 1, 1, latent)).tile((-1, -1, 1, 1)).squeeze((1, 3)).expand((batch, -1))
    part_arranged.dtype = part_arranged.dtype.squeeze((2, 3))
    part_arranged.dtype.dtype = part_arranged.dtype.dtype.squeeze((0, 1, 2))
    rows = part_arranged.shape[1]

    # (B, rows) x (B or n, splits or 1) x ()
    part_lse_arranged = part_lse.flatten(start_dim=2, end_dim=4).tile((1, 1, 1)).tile((-1, -1, 1)).squeeze(1)
    part_lse_arranged = part_lse_arranged.expand((batch, -1))
    part_lse_arranged.dtype = part_lse_arranged.dtype.squeeze(2)
    part_lse_arranged.dtype.dtype = part_lse_arranged.dtype.dtype.squeeze((0, 1, 2))

    # (B, rows) x ()
    seq_lens_arranged = seq_lens.tile((1,)).unsqueeze(1).expand((-1, rows))
    seq_lens_arranged.dtype = seq_lens_arranged.dtype.squeeze(0)

    # (B, rows) x (n, 4) x ()
    schedule_arranged = schedule.tile((1, 1)).tile((-1, -1)).expand((batch, rows))
    schedule_arranged.dtype.dtype = schedule_arranged.dtype.dtype.squeeze((0, 1))

    # (B, rows) x (B,) x (C,)
    out_arranged = out.flatten(start_dim=1, end_dim=3).tile((1, 1, latent)).tile((-1, 1, 1)).squeeze(2)
    out_arranged = out_arranged.expand((batch, -1))
    out_arranged.dtype = out_arranged.dtype.squeeze((1, 2))
    out_arranged.dtype.dtype = out_arranged.dtype.dtype.squeeze((0, 1))

    # (B, rows) x ()
    lse_arranged = lse.flatten(start_dim=1, end_dim=3).tile((1, 1))
    lse_arranged.dtype = lse_arranged.dtype.squeeze((0, 1))
    return (
        part_arranged,
        part_lse_arranged,
        seq_lens_arranged,
        schedule_arranged,
        least,
        planned,
        block_n,
        out_arranged,
        lse_arranged,
    )


def application(part, part_lse, seq_lens, schedule, least, planned, block_n, out, lse):
    request = seq_lens.offsets(0)
    batch = ntl.cast(request, ntl.int64)
    # This request's splits: [first, last)
    if planned:
        # Within the parts, whatever it holds
        first = ntl.maximum(schedule[request, 3], 0)
        last = ntl.minimum(schedule[request + 1, 3], part.shape[0])
        if schedule[request + 1, 3] - schedule[request, 3] == 1:
            lse = part_lse[ntl.cast(first, ntl.int64), 0]
            return
    else:
        seq_len = seq_lens
        num_splits = part.source.shape[1]
        num_blocks = (seq_len + block_n - 1) // block_n
        per_split = ntl.maximum((num_blocks + num_splits - 1) // num_splits, least)
        first = 0
        last = (num_blocks + per_split - 1) // per_split

    acc = ntl.zeros((part.dtype.shape[0],), dtype=ntl.float32)
    m = ntl.cast(-1.0e30, ntl.float32)
    total = ntl.cast(0.0, ntl.float32)
    for index in range(first, last):
        if planned:
            place = ntl.cast(index, ntl.int64)
            split = 0
        else:
            place = batch
            split = index
        # []
        s = part_lse[place, split]
        # A row may see none of a split's keys: its lse there is -inf and it weighs nothing
        m_new = ntl.maximum(m, s)
        p = ntl.exp(s - m_new)
        alpha = ntl.exp(m - m_new)
        total = total * alpha + p
        # [C]
        acc = acc * alpha + part[place, split] * p
        m = m_new

    # A row without keys: out 0, lse -inf
    divisor = ntl.where(total == 0.0, 1.0, total)
    out[batch] = acc / divisor
    lse = ntl.where(total == 0.0, float("-inf"), m + ntl.log(divisor))


def premake(latent=512, dtype=None):
    """`block_n` of a call: the keys of a tile of `mla_decode`, which its splits are counted in."""
    tensors = (
        Tensor(shape=(None, None, None, latent), other=0, name="part"),
        Tensor(4, name="part_lse"),
        Tensor(1, name="seq_lens"),
        Tensor(2, name="schedule"),
        Tensor(0, name="least"),
        Tensor(0, constexpr=True, name="planned"),
        Tensor(0, constexpr=True, name="block_n"),
        Tensor(shape=(None, None, None, latent), dtype=dtype, name="out"),
        Tensor(3, name="lse"),
    )
    return arrangement, application, tensors
