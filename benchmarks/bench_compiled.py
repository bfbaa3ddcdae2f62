"""The Triton kernels compiled for GPUs that need not be there: registers, spills and loads, as `make aot` has them.

python -m benchmarks.bench_compiled --save
"""

import argparse
from concurrent.futures import ProcessPoolExecutor

from benchmarks.measure import progress_bar, save_results


def main() -> None:
    from pocl_kernels.triton_backend import aot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--save", action="store_true", help="file the result under benchmarks/results")
    options = parser.parse_args()
    jobs = aot.default_variants()
    reports = {}
    with progress_bar(len(jobs)) as advance, ProcessPoolExecutor(options.jobs) as pool:
        for variant, target, report in pool.map(aot._job, jobs):
            advance(f"{variant} {target}")
            reports[f"{variant} {target}"] = report._asdict()
    spilling = [name for name, report in reports.items() if report["spilled_bytes"]]
    print(f"{len(reports)} kernels compiled, {len(spilling)} with spills", *spilling, sep="\n  ")
    print(f"registers: at most {max(report['registers'] for report in reports.values())}")
    if options.save:
        print(f"filed in {save_results('compiled', {'kernels': reports})}")


if __name__ == "__main__":
    main()
