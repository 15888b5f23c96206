"""What the scripts share: the private ComfyUI, its server and client, workflows."""
