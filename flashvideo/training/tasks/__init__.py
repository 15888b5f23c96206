"""What can be trained, and what the trainings share."""
