"""The ablation of Dot's toolbox: what each method changes, in quality, size and speed."""
