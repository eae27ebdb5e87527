"""The ops. Each is one class: fields with bounds, sampling, output size, boxes, and the way back.

`op.py` says what an op is. How a backend executes an op is in `raypipe.images.opencv` and
`raypipe.images.torchvision`.
"""
