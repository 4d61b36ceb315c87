//! Threads of their own for bulk bytes, in `bulk` and `target`: words that go to and fro would otherwise wait here, behind
//! what is always ready, rather than in the system that is measured.

use std::{io, sync::LazyLock};

use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::JoinError,
};
use tokio_util::task::AbortOnDropHandle;

/// The machine has few cores, and most of them are the systems'.
const THREADS: usize = 2;

static BULK: LazyLock<io::Result<Runtime>> = LazyLock::new(runtime);

pub(crate) fn runtime() -> io::Result<Runtime> {
    Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()
}

/// Where bulk bytes are moved. Ends with the process.
pub(crate) fn bulk() -> io::Result<&'static Handle> {
    let begun = BULK.as_ref().map_err(|error| io::Error::new(error.kind(), error.to_string()));
    begun.map(Runtime::handle)
}

/// Does this there. Ends it when dropped.
pub(crate) async fn there<T: Send + 'static>(
    threads: &Handle,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, JoinError> {
    AbortOnDropHandle::new(threads.spawn(work)).await
}
