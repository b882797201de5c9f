"""The files of a checkpoint: the manifest, and one HDF5 file per rank."""
