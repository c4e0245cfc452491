"""Pages of `ssl3d view`: of a store, of runs, and of predictions beside the truth."""
