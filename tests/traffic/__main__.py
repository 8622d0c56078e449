"""The command line of the traffic: python -m traffic --base-url http://127.0.0.1:8080 --keys keys.json ..."""

import argparse
import json
import sys
from pathlib import Path

from traffic.asks import LONGEST_TOKENS
from traffic.client import AddressRefused, Options, run
from traffic.summary import as_json, surprises, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="traffic", description=__doc__)
    parser.add_argument("--base-url", required=True, help="the gateway, for example http://127.0.0.1:8080")
    parser.add_argument(
        "--keys", required=True, type=Path, help='a JSON file with the API key of every tenant: {"acme": ...}'
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seconds", type=float, default=60, help="no new requests after this time (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed asks the same (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=3, help="requests at a time for each tenant (%(default)s)")
    parser.add_argument(
        "--longest", type=int, default=LONGEST_TOKENS, help="tokens of the longest answer (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write every exchange as JSON into this file")
    parser.add_argument("--any-address", action="store_true", help="allow another machine than this one")
    parser.add_argument("--tolerate", action="store_true", help="exit with 0 even when requests failed")
    given = parser.parse_args()
    options = Options(
        base_url=given.base_url,
        keys=json.loads(given.keys.read_text()),
        model=given.model,
        seconds=given.seconds,
        seed=given.seed,
        concurrency=given.concurrency,
        longest=given.longest,
        any_address=given.any_address,
    )
    try:
        exchanges = run(options)
    except AddressRefused as refused:
        print(refused, file=sys.stderr)
        return 2
    if given.output:
        given.output.write_text(as_json(exchanges))
    print(table(exchanges))
    found = surprises(exchanges)
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found and not given.tolerate else 0


if __name__ == "__main__":
    sys.exit(main())
