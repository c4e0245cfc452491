"""The HDF5 store: records, index, writing, reading."""
