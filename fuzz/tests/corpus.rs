//! Replays the committed corpus of every fuzz target, so that what a fuzzer once found stays found.

use std::{fs, path::Path};

#[test]
fn every_input_of_the_corpus_passes() {
    for (name, target) in tunnel_fuzz::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut replayed = 0;
        for entry in entries {
            target(&fs::read(entry.unwrap().path()).unwrap());
            replayed += 1;
        }
        assert!(replayed > 0, "the corpus of {name} is empty");
    }
}
