"""What `import llamanb` costs, above a bare interpreter: median of twenty fresh processes each.

python -m benchmarks.import_time
"""

import statistics
import subprocess
import sys
import time


def seconds(code: str, times: int = 20) -> float:
    taken = []
    for _ in range(times):
        begin = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True)
        taken.append(time.monotonic() - begin)
    return statistics.median(taken)


def main() -> None:
    bare, loaded = seconds("pass"), seconds("import llamanb")
    print(f"bare interpreter {bare:.3f} s, with `import llamanb` {loaded:.3f} s: {loaded - bare:.3f} s more")


if __name__ == "__main__":
    main()
