"""The Rust broker of the `iotcore` wheel, for machines without mosquitto: `python -m hil.rumqttd --port N`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

CONFIG = """
id = 0
[router]
id = 0
max_connections = 100
max_outgoing_packet_count = 200
max_segment_size = 1048576
max_segment_count = 10
[v5.1]
name = "v5-1"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 5000
max_payload_size = 262144
max_inflight_count = 200
dynamic_filters = true
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    try:
        from iotcore import IotCoreBroker
    except ModuleNotFoundError:
        print("neither mosquitto nor the iotcore wheel (extra `broker`) is installed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="rumqttd-") as folder:
        config = Path(folder) / "rumqttd.toml"
        config.write_text(CONFIG.format(port=args.port))
        broker = IotCoreBroker(config_path=str(config))  # reads it now; a signal that ends `run_forever` leaves no file
    broker.run_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
