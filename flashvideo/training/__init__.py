"""Training: data, degradations, losses and loops; builds FlashVideo-Nano and fine-tunes the official weights."""
