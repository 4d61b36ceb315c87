//! rathole's own program: its `main` is not part of its library, and `cargo install rathole` does not build any more.
//! Run by `benches/compare`.

use clap::Parser;
use tokio::sync::broadcast;
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let (_end, ended) = broadcast::channel(1);
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::from("info")))
        .with_ansi(false)
        .init();
    rathole::run(rathole::Cli::parse(), ended).await
}
