//! Thin: the command line is in `cli.rs`, everything else in the library.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use tunnel_edge::cli::{Cli, Next};

/// Buffers come and go with every batch, which the C library's allocator answers with page faults and calls of `brk`: a
/// seventh of all CPU time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let ended = Cli::parse().prepare().and_then(|next| match next {
        Next::Run(config) => tunnel_edge::run(*config).map_err(io::Error::other),
        Next::Exit(code) => Ok(code),
    });
    ended.unwrap_or_else(|error| {
        // Where standard error is gone too, the exit code must do.
        let _ = writeln!(io::stderr(), "tunnel-edge: {error}");
        ExitCode::FAILURE
    })
}
