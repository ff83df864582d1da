"""Measure FID and other distances between sets of images; the same as `morse eval fid`.

python eval/fid.py --real REAL_DIR --fake FAKE_DIR --inception_weights inception.safetensors
accelerate launch eval/fid.py --pipeline fashion-mnist --real fashion-mnist --lsd 5 10 20 \
    --num_images 5000 --output_dir fid_output --json fid.json
"""

from morse.cli import run_command
from morse.evaluation.fid.command import FidConfig, run_fid

if __name__ == "__main__":
    run_command(FidConfig, run_fid)
