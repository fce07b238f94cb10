"""From image-text tars to training batches: ingest, index and verify, encode, load.

Imports nothing of `t2i` or `eval`. See `data_pipeline.index` for the formats on disk.
"""
