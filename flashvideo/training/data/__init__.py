"""What trainings learn from: videos, fetched clips, moving photographs, latents, degradations."""
