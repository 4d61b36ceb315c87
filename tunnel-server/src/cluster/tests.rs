//! Tests of how the watch takes success and failure, by its own clock and its own log.

use std::{fmt, sync::Arc};

use futures_util::stream;
use kube::core::Status;
use parking_lot::Mutex;
use tracing::{
    Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::*;
use crate::testing::metrics;

/// What is logged for people, a line each.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().push(line.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

impl Lines {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock())
    }
}

const FIRST: &str = "the nodes have been read from the cluster";
const AGAIN: &str = "the cluster's nodes are read again";
const LOST: &str = "the nodes cannot be read from the cluster; trying again";

fn watch() -> ClusterWatch {
    let shared = SharedGrants::new(Grants::default());
    ClusterWatch::new(Access::Kubeconfig("/nowhere".into()), Grants::default(), shared, metrics())
}

impl ClusterWatch {
    /// A watch that lists no nodes, then is cut after `lasting`: the pause that follows.
    async fn cut_after(&mut self, lasting: Duration) -> Duration {
        let listed = stream::iter([Ok(Event::Init), Ok(Event::InitDone)]);
        let cut = stream::once(async move {
            sleep(lasting).await;
            Err(watcher::Error::WatchError(Box::new(Status { code: 500, ..Status::default() })))
        });
        let lost = self.follow(listed.chain(cut)).await;
        assert_eq!(lost, Lost::failed("the API server ends the watch with 500: "));
        self.pause(&lost)
    }
}

#[tokio::test(start_paused = true)]
async fn only_a_watch_that_holds_is_a_success() {
    let lines = Lines::default();
    let _guard = tracing::subscriber::set_default(lines.clone());
    let mut watch = watch();
    let longest = {
        let mut longest = Duration::ZERO;
        for _ in 0..6 {
            longest = longest.max(watch.cut_after(Duration::from_secs(1)).await);
        }
        longest
    };
    assert!(longest > Duration::from_secs(10), "{longest:?}");
    assert_eq!(lines.take(), [FIRST, LOST]);

    // The pauses begin anew, and so does what is said.
    let pause = watch.cut_after(HOLD + Duration::from_secs(1)).await;
    assert!(pause < Duration::from_secs(3), "{pause:?}");
    assert_eq!(lines.take(), [AGAIN, LOST]);
}

#[tokio::test(start_paused = true)]
async fn the_first_list_is_told_once() {
    let lines = Lines::default();
    let _guard = tracing::subscriber::set_default(lines.clone());
    let mut watch = watch();
    watch.pause(&Lost::failed("it is away"));
    assert_eq!(lines.take(), [LOST]);
    watch.cut_after(HOLD * 2).await;
    assert_eq!(lines.take(), [FIRST, LOST]);
}

#[test]
fn what_an_api_server_says_is_cut() {
    let page = format!("<html>\n{}", "ä".repeat(500_000));
    let status = || Box::new(Status { code: 502, message: page.clone(), ..Status::default() });
    for error in
        [watcher::Error::WatchError(status()), watcher::Error::InitialListFailed(kube::Error::Api(status()))]
    {
        let Lost::Failed(cause) = Lost::by(&error) else { panic!("{error:?} is a failure") };
        assert!(cause.contains("502: <html> ää") && cause.ends_with("..."), "{cause}");
        assert!(cause.chars().count() < 310, "{}", cause.len());
    }
    let Lost::Failed(cause) = Lost::failed(&page) else { panic!("a failure") };
    assert!(cause.len() < 700);
}
