"""The page of tiers_mooncake.py, from what it found. Simulates nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from in_process import markdown_table

Found = Mapping[str, Any]

HEAD = """# KV tiers under Mooncake's trace, simulated

Written by `benchmarks/tiers_mooncake.py` on {date}; do not edit. All figures are in
`tiers-mooncake.json` beside this page. They are of a simulation: the scheduler that ships, with
priced steps and priced moves ([design](../design/planner.md#tiers-in-virtual-time)). No figure but
this one depends on the machine: all runs took {took_s:.0f} s together ({machine}).

The load: the first {trace_minutes:.0f} minutes of an hour of Mooncake's conversations (FAST 2025),
{num_requests:,} requests with {prompt_millions:.1f} million tokens of prompts, {mean_prompt:,.0f}
each on average. It tells which blocks of 512 tokens prompts share. **{ceiling:.1%} of the prompts'
tokens came before at the same place: no cache finds more.**

"""

SETTING = """## {name}

{model}, {layout}.
The trace comes at {speed:g} of its recorded speed, {rate:.2f} requests/s, as the service that it is
of had more devices. The arena has {arena:,} tokens: {arena_prompts:.0f} mean
prompts.

{table}

{moves}
"""

HOW = """RAM and disk are GiB for the replica. Found: of all tokens of prompts, by the tier that had
them when a request was first admitted. Computed: tokens of prompts, in millions. TTFT in seconds,
TPOT in milliseconds. Moves: seconds of copies within steps, seconds that the disk read and wrote,
which part of that lay behind steps, and seconds in which nothing could be computed before the disk
had read. Declined are blocks that a tier had and that were computed all the same, as that is
cheaper; refused those that were not written, as the disk was behind.
"""


def page(found: Found) -> str:
    prompt_tokens, count = found["prompt_tokens"], found["num_requests"]
    parts = [
        HEAD.format(
            **found,
            prompt_millions=prompt_tokens / 1e6,
            mean_prompt=prompt_tokens / count,
            trace_minutes=found["trace_s"] / 60,
            took_s=sum(each["took_s"] for each in found["results"]),
        ),
        HOW,
    ]
    for name, setting in found["settings"].items():
        own = [each for each in found["results"] if each["setting"] == name]
        parts.append(
            SETTING.format(
                name=name,
                **setting,
                rate=count / found["trace_s"] * setting["speed"],
                arena=own[0]["arena_tokens"],
                arena_prompts=own[0]["arena_tokens"] / (prompt_tokens / count),
                table=_hits_table(own),
                moves=_moves_table(own),
            )
        )
    return "\n".join([*parts, READING, AGAIN])


def _hits_table(results: Sequence[Found]) -> str:
    header = ["RAM, disk", "arena", "RAM", "disk", "found", "computed", "TTFT p50", "TTFT p99"]
    rows = [
        [
            _sizes(each),
            *(_rate(each, tier) for tier in ("arena", "ram", "disk")),
            f"{sum(each['hit_rates'].values()):.1%}",
            f"{each['computed_tokens'] / 1e6:.1f}",
            f"{each['ttft_p50']:.2f}",
            f"{each['ttft_p99']:.2f}",
            f"{each['tpot_p50'] * 1000:.1f}",
            f"{each['busy']:.0%}",
        ]
        for each in results
    ]
    return markdown_table([*header, "TPOT p50", "busy"], rows)


def _moves_table(results: Sequence[Found]) -> str:
    header = ["RAM, disk", "copies", "disk reads", "writes", "behind steps", "waited"]
    header += ["RAM declined", "disk declined", "refused"]
    rows = []
    for each in results:
        if (tiers := each["tiers"]) is None:
            continue
        has_disk = each["disk_gib"] is not None
        rows.append(
            [
                _sizes(each),
                f"{tiers['copy_s']:.0f}",
                *(
                    f"{tiers[name]:.0f}" if has_disk else ""
                    for name in ("disk_read_s", "disk_write_s")
                ),
                f"{tiers['disk_hidden']:.0%}" if has_disk else "",
                f"{tiers['waited_s']:.0f}" if has_disk else "",
                f"{tiers['ram_blocks']['declined']:,}",
                *(
                    f"{tiers['disk_blocks'][name]:,}" if has_disk else ""
                    for name in ("declined", "refused")
                ),
            ]
        )
    return markdown_table(header, rows)


def _rate(result: Found, tier: str) -> str:
    return f"{result['hit_rates'][tier]:.1%}" if tier in result["hit_rates"] else ""


def _sizes(result: Found) -> str:
    if result["ram_gib"] is None:
        return "none"
    ram = f"{result['ram_gib']:g}"
    return ram if result["disk_gib"] is None else f"{ram}, {result['disk_gib']:g}"


READING = """## What it shows (of the first 800 requests)

- **What counts is how much is kept.** What comes again comes late: an arena of 34 prompts has 3.7
  of the 19.4 % that came before, 128 GiB of RAM 2.1 more, 512 GiB 13.4 more, 2 TiB all. With all
  of it the A100 computes 16 % fewer tokens of prompts, and TTFT is shorter by 16 % (median) and
  17 % (p99); on the H100s 15 %, 19 % and 9 %.
- **A small tier hardly helps.** With 128 GiB the A100's median TTFT is 5 % longer than without
  (p99 is 13 % shorter): each block that leaves the arena is copied inside a step, and of 42 that
  were, one came back. The copies take 1.4 % of the run, whether RAM is small or large.
- **A disk with room for everything finds less than came.** The writer's queue is 64 MiB, which is
  one block of the 8B model here; what comes while it is full is dropped, and a chain ends at its
  first missing block. So 8 % of refused blocks cost a third of what could be found: 13.4 instead
  of 19.4 %, and a median TTFT that is 1 % shorter than without tiers. With a queue of 8 GiB
  (`MAX_QUEUED_BYTES`, changed by hand) nothing is refused, 19.4 % are found, and the median TTFT
  is 6.27 s: still longer than with 512 GiB of RAM and no disk, as copies take twice the time.
- **Beside eight H100 the disk does not help.** While a prompt is computed they make KV of the 70B
  model faster than one drive writes it, and the queue is smaller than one block. More than half
  is refused, though the drive is idle two thirds of the time; what is on it are pieces of chains:
  0.5 %.
- Nothing was declined: to read what is there was always cheaper than to compute it, and nearly
  all of the disk's time lies behind steps. Its price is in the copies.

Of the whole hour's tokens 37.3 % came before, of these minutes' 19.4 %: over a day tiers find
more, and need to be larger. Nobody has measured these settings; steps are priced as
[planner.md](../design/planner.md) tells, and copies as public logs of one large copy, not of many
small ones.
"""

AGAIN = """## Again

```sh
python benchmarks/tiers_mooncake.py --trace mooncake_conversation.jsonl --num-prompts 800
```

Without `--num-prompts` it is the whole hour, which takes some fifteen times as long.
"""
