"""`pagefork info`."""

from __future__ import annotations

import json

from support.cli import pagefork


def test_info_tells_what_the_demo_model_runs_with() -> None:
    facts = json.loads(pagefork("info", "--json", "--num-blocks", "64", "--block-size", "8").stdout)
    assert (facts["parameters"], facts["num_blocks"], facts["block_size"]) == (5_770_496, 64, 8)
    table = pagefork("info", "--num-blocks", "64").stdout
    assert "5,770,496" in table
    assert len(table.splitlines()) == len(facts)
