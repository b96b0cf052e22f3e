"""The commands that this package adds to ``avp-agents``: ``bench`` and ``report``."""

from avp_bench.cli.chain import bench_chain
from avp_bench.cli.engine import bench
from avp_bench.cli.handoff import bench_handoff
from avp_bench.cli.quality import bench_quality, report
from avp_bench.cli.reference import bench_reference
from avp_bench.cli.soak import bench_soak
from avp_bench.cli.throughput import bench_throughput

__all__ = ["bench", "report"]

bench.command("chain")(bench_chain)
bench.command("handoff")(bench_handoff)
bench.command("quality")(bench_quality)
bench.command("reference")(bench_reference)
bench.command("soak")(bench_soak)
bench.command("throughput")(bench_throughput)
