"""Model folders of transformers: their files, how a family's names map to minimoe's, and models opened from and saved as folders."""
