"""Measure Morse against the training-free solvers and controls; the same as `morse bench`.

python eval/benchmark.py --num_images 5000 --output_dir benchmark_output
"""

from morse.cli import run_command
from morse.evaluation.bench.benchmark import BenchmarkConfig, run_benchmark

if __name__ == "__main__":
    run_command(BenchmarkConfig, run_benchmark)
