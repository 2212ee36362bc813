//! Linear layers rewritten into parts that share low-rank bases across layers.
