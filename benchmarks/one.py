"""Runs one measurement of one contender once: ``python -m benchmarks.one MEASUREMENT CONTENDER KEY=VALUE ...``.

Prints one line of JSON: ``{"figures": ...}``, ``{"skipped": reason}`` or ``{"failed": reason}``.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import contenders, listening, peers
from benchmarks.contenders import Contender
from benchmarks.measurements import MEASUREMENTS
from benchmarks.measurements.base import Measurement, Unsuited

CONTENDERS: dict[str, type[Contender]] = {
    contender.name: contender
    for contender in (
        contenders.Microbatch,
        contenders.MicrobatchNow,
        contenders.MicrobatchInterval,
        contenders.MicrobatchLong,
        contenders.MicrobatchAllWaiting,
        contenders.MicrobatchAdaptive,
        contenders.MicrobatchPlain,
        contenders.Pool,
        peers.Batched,
        peers.UBatch,
        peers.PyBatcher,
        peers.ServiceStreamer,
        peers.PubSub,
        contenders.OneThread,
        contenders.Locks,
        contenders.LocksNow,
        listening.Batches,
        listening.Jobs,
        listening.Context,
        listening.Logging,
        listening.Prometheus,
        listening.OpenTelemetry,
        listening.Tqdm,
    )
}


def measure(measurement: Measurement, contender: type[Contender], settings: Mapping[str, float]) -> dict[str, Any]:
    """Run the measurement in this process, and return its outcome."""
    try:
        return {"figures": measurement.run(contender, **settings)}
    except Unsuited as reason:
        return {"skipped": str(reason)}
    except ImportError as error:
        return {"skipped": f"can't be imported: {error.msg.partition(' (')[0]}"}  # without the path that may follow
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".rstrip(": ")}


def _setting(text: str) -> "tuple[str, float]":
    key, _, value = text.partition("=")
    return key, json.loads(value)


def main(arguments: Sequence[str]) -> None:
    """Run the command, and end the process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one", description=__doc__.partition("\n")[0])
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("settings", nargs="*", type=_setting, metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    outcome = measure(MEASUREMENTS[options.measurement], CONTENDERS[options.contender], dict(options.settings))
    print(json.dumps(outcome), flush=True)
    os._exit(0)  # even if the contender has left a thread that never ends


if __name__ == "__main__":
    main(sys.argv[1:])
