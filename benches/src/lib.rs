//! Benches only; see `benches/`. Run them with `cargo bench -p tunnel-benches`.
