"""mla_schedule: which keys of which request each program of a decode takes."""

from __future__ import annotations

import functools

import torch

from ntops_mla import dispatch
from ntops_mla.board import Board, Needed, board_of
from ntops_mla.kernel import Kernel
from ntops_mla.ops import _check
from ntops_mla.ops._op import get, register
from ntops_mla.ops._split import SPLIT_KEYS
from ntops_mla.platform import Platform, detect

# Keys that splits are counted in: a multiple of every tile's.
UNIT = 128
# Blocks of all requests that are counted at most: sums are int32.
_SUM = 2**30
# Where a request's last split ends: at its length, whatever that is by then.
_OPEN = 2**31 - 1
# Rows of a program of decode, as FlashMLA counts them when it shares out its processors.
_ROWS = 64
# Requests for each part from which on nothing is cut: mla_combine has a program for each row of a request, which only
# finds that there is nothing to join, and those of so many would take a tenth of decode's time. It bounds the room for
# parts, too, of which only those of cut requests are touched: 173 MB for 527 requests of 128 heads on 132 processors.
_WAVES = 4


def mla_schedule(seq_lens: torch.Tensor, rows: int, num_parts: int | None = None) -> torch.Tensor:
    """Cut requests of different lengths into splits of no more than a fair share, for mla_decode and mla_decode_fp8.

    blocks[b] = min(ceil(seq_lens[b] / 128), floor(2^30 / B));  share = max(ceil(sum(blocks) / num_parts), 2);
    splits[b] = max(1, ceil(blocks[b] / share));  first[b] = splits[0] + ... + splits[b - 1]

    seq_lens: int32 `[B]`, with the new tokens. rows: s_q H, the queries of a request. num_parts: how many splits of
    equal size would fill the device, None: two for each of its processors, over the programs of 64 rows that a split
    is. Returns int32 `[B + num_parts, 4]`: row first[b] + i is (b, first key of split i, key behind its last one, .),
    rows that are not used are (-1, 0, 0, .), and the last column is first and zeros. A request's last split ends at
    2^31 - 1, for which decode takes the length that it finds: with other lengths of as many requests a schedule is
    unfair and never wrong. Nothing waits for the device. Raises TypeError or ValueError that names the argument.
    Source: deepseek-ai/FlashMLA, get_mla_metadata.
    """
    return torch.ops.ntops_mla.mla_schedule(seq_lens, rows, num_parts)


def decode_schedule(seq_lens: torch.Tensor, rows: int, keys: int) -> torch.Tensor | None:
    """The schedule of decode calls of `rows` = s_q H rows and at most `keys` keys a request.

    None where its kernel does not run, and where it is not wanted: of one request equal splits are fair, short ones are
    never cut, and very many fill the device whole. (Of these, one far longer than all others is the last to end.)
    """
    batch = seq_lens.shape[0]
    if batch < 2 or keys <= SPLIT_KEYS or batch >= _WAVES * _parts(seq_lens.device, rows, None):
        return None
    if not torch.compiler.is_compiling():
        spec = get("mla_schedule").spec
        if dispatch.chosen(spec, seq_lens.device, (seq_lens, rows, None)).backend != "kernel":
            return None
    return mla_schedule(seq_lens, rows)


def _parts(device: torch.device, rows: int, num_parts: int | None) -> int:
    """Two programs on each processor, as `_split.split` wants them, unless it is said; 1 where no kernel runs."""
    if num_parts is not None:
        return num_parts
    detection = detect(device)
    if detection.platform is None:
        return 1
    return max(1, 2 * board_of(detection).processors // -(-max(rows, 1) // _ROWS))


def _check_args(seq_lens, rows, num_parts):
    op = "mla_schedule"
    _check.tensor(op, "seq_lens", seq_lens, "[B]", 1)
    _check.dtype(op, "seq_lens", seq_lens, (torch.int32,))
    _check.count(op, "rows", rows, 0)
    if num_parts is not None:
        _check.count(op, "num_parts", num_parts, 1)


def _reference(seq_lens, rows, num_parts):
    batch, device = seq_lens.shape[0], seq_lens.device
    num_parts = _parts(device, rows, num_parts)
    schedule = torch.zeros(batch + num_parts, 4, dtype=torch.int32, device=device)
    blocks = ((seq_lens.long().clamp(min=0) + UNIT - 1) // UNIT).clamp(max=_SUM // max(batch, 1))
    share = ((blocks.sum() + num_parts - 1) // num_parts).clamp(min=SPLIT_KEYS // UNIT)
    splits = ((blocks + share - 1) // share).clamp(min=1)
    first = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    torch.cumsum(splits, 0, out=first[1:])
    row = torch.arange(len(schedule), device=device)
    # [B + parts], B where the row is not used
    request = torch.searchsorted(first[1:], row, right=True)
    used, known = request < batch, request.clamp(max=max(batch - 1, 0))
    if batch:
        keys = (blocks + splits - 1) // splits * UNIT
        split = row - first[known]
        schedule[:, 1] = torch.where(used, split * keys[known], 0)
        end = torch.where(split < splits[known] - 1, (split + 1) * keys[known], _OPEN)
        schedule[:, 2] = torch.where(used, end, 0)
    schedule[:, 0] = torch.where(used, request, -1)
    schedule[: batch + 1, 3] = first
    return schedule


def _fake(seq_lens, rows, num_parts):
    shape = seq_lens.shape[0] + _parts(seq_lens.device, rows, num_parts), 4
    return torch.empty(shape, dtype=torch.int32, device=seq_lens.device)


def _key(seq_lens, rows, num_parts):
    return (torch.int32,), ()


def _supports(platform: Platform, dtypes: tuple, sizes: tuple) -> str | None:
    return None  # any lengths


def _tiles(board: Board, dtypes: tuple, sizes: tuple) -> list:
    return [Needed("mla_schedule", board.tile("mla_schedule", dtypes[0]))]


@functools.lru_cache(maxsize=64)
def _made(board: Board) -> Kernel:
    return board.make("mla_schedule", board.tile("mla_schedule", torch.int32))


def _kernel(board: Board, seq_lens, rows, num_parts):
    if not seq_lens.shape[0]:
        return _reference(seq_lens, rows, num_parts)
    schedule = _fake(seq_lens, rows, num_parts)
    _made(board)(seq_lens, UNIT, SPLIT_KEYS // UNIT, schedule)
    return schedule


def _example(device="cpu", dtype=torch.int32, *, tokens=4, heads=16, num_parts=8, **_):
    """`tokens` requests, each longer than the one before; of whole numbers, whatever dtype says."""
    return 300 * torch.arange(tokens, device=device, dtype=torch.int32), heads, num_parts


mla_schedule = register(
    mla_schedule,
    schema="(Tensor seq_lens, int rows, int? num_parts=None) -> Tensor",
    check=_check_args,
    fake=_fake,
    reference=_reference,
    key=_key,
    supports=_supports,
    example=_example,
    kernel=_kernel,
    tiles=_tiles,
    dtypes=(torch.int32,),
)
