"""What is trained: detection models, how they are judged, and how they are kept. torch, no Ray."""
