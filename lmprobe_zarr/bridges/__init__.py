"""Foreign formats: each file of them to `TokenBatch`, and activations to lmprobe's files. Never hooks, zarr or a store.

One module per format; what they have in common stands in `entry`, and `files` opens what they read.
"""
