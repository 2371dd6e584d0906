"""An LLMEngine stepped by hand: the text of several requests as it grows, one that joins late and one that is aborted.

    python examples/streaming.py [--model DIRECTORY_OR_HUB_ID]

Outputs are cumulative; what a request has shown so far makes deltas of them.
"""

from __future__ import annotations

import argparse

from pagefork import EngineConfig, LLMEngine, SamplingParams

PARAMS = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=16, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    engine = LLMEngine(EngineConfig(model=parser.parse_args().model))

    engine.add_request("first", "def main(", PARAMS.replace(seed=1))
    engine.add_request("endless", "import os\n", PARAMS.replace(seed=2, max_tokens=None))
    shown = {"first": 0, "endless": 0, "late": 0}
    step = 0
    while engine.has_unfinished_requests():
        step += 1
        if step == 6:
            engine.add_request("late", "class Queue:\n", PARAMS.replace(seed=3))
        if step == 12:
            engine.abort_request("endless")
        for request in engine.step():
            [output] = request.outputs
            delta = output.text[shown[request.request_id] :]
            shown[request.request_id] = len(output.text)
            print(f"step {step:2}  {request.request_id:8}{delta!r}")
            if request.finished:
                print(f"         {request.request_id} ends: {output.finish_reason}, {output.text!r}")

    stats = engine.stats()
    print(f"{stats.free_blocks} of {stats.num_blocks} cache blocks are free")


if __name__ == "__main__":
    main()
