"""One executor for each tier, all behind one small Protocol."""
