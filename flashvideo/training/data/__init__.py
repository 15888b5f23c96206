"""What trainings learn from: videos, latents, degradations."""
