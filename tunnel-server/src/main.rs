//! Thin: the command line is in `cli.rs`, everything else in the library.

use std::{
    error::Error,
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use tunnel_server::cli::{Cli, Next};

/// Buffers come and go with every batch, which the C library's allocator answers with page faults and calls of `brk`: a
/// seventh of all CPU time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    act().unwrap_or_else(|error| {
        // Where standard error is gone too, the exit code must do.
        let _ = writeln!(io::stderr(), "tunnel-server: {error}");
        ExitCode::FAILURE
    })
}

fn act() -> Result<ExitCode, Box<dyn Error>> {
    Ok(match Cli::parse().prepare()? {
        Next::Run(config) => tunnel_server::run(&config)?,
        Next::Dev(args) => tunnel_server::dev::run(args.check)?,
        Next::Exit(code) => code,
    })
}
