//! The link protocol by hand, message by message, for either side: what a faulty edge or gateway says.

use std::future::poll_fn;

use bytes::BytesMut;
use futures_util::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::{
    compat::{Compat, TokioAsyncReadCompatExt},
    task::AbortOnDropHandle,
};
use tunnel_core::proto::{
    frame,
    messages::{Control, Hello, Welcome, control::Kind},
};
use yamux::{Config, Connection, Mode};

use crate::rig::soon;

/// A control stream. Dropping it drops the connection.
pub(crate) struct Script {
    control: yamux::Stream,
    input: BytesMut,
    _driver: AbortOnDropHandle<()>,
}

impl Script {
    /// As an edge: opens the control stream, which nobody sees before something is said on it.
    pub(crate) async fn edge(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let mut connection = Connection::new(io.compat(), Config::default(), Mode::Client);
        let control = poll_fn(|cx| connection.poll_new_outbound(cx)).await.unwrap();
        Self::new(connection, control)
    }

    /// As a gateway: takes the control stream.
    pub(crate) async fn gateway(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let mut connection = Connection::new(io.compat(), Config::default(), Mode::Server);
        let inbound = soon("the control stream", poll_fn(|cx| connection.poll_next_inbound(cx))).await;
        let control = inbound.unwrap().unwrap();
        Self::new(connection, control)
    }

    fn new<T>(mut connection: Connection<Compat<T>>, control: yamux::Stream) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let driving = async move {
            while let Some(Ok(stream)) = poll_fn(|cx| connection.poll_next_inbound(cx)).await {
                drop(stream);
            }
        };
        let driver = AbortOnDropHandle::new(tokio::spawn(driving));
        Self { control, input: BytesMut::new(), _driver: driver }
    }

    /// Says anything.
    pub(crate) async fn say(&mut self, bytes: &[u8]) {
        self.control.write_all(bytes).await.unwrap();
        self.control.flush().await.unwrap();
    }

    /// Says a message.
    pub(crate) async fn send(&mut self, kind: Kind) {
        let mut out = BytesMut::new();
        frame::encode(&Control { kind: Some(kind) }, &mut out).unwrap();
        self.say(&out).await;
    }

    /// What the other side says next; `None` when it has no more to say.
    pub(crate) async fn hear(&mut self) -> Option<Kind> {
        loop {
            if let Some(message) = frame::decode::<Control>(&mut self.input).unwrap() {
                return message.kind;
            }
            let mut piece = [0; 1024];
            let read = soon("a message, or the end", self.control.read(&mut piece)).await.unwrap_or_default();
            if read == 0 {
                return None;
            }
            self.input.extend_from_slice(&piece[..read]);
        }
    }

    /// What the gateway says against this edge.
    pub(crate) async fn rejection(&mut self) -> tunnel_core::proto::messages::Reject {
        match self.hear().await {
            Some(Kind::Reject(reject)) => {
                assert_eq!(self.hear().await, None, "words behind a rejection");
                reject
            }
            other => panic!("not a rejection: {other:?}"),
        }
    }
}

/// What a good edge says first.
pub(crate) fn hello(node: &str) -> Hello {
    Hello {
        min_version: 1,
        max_version: 1,
        software: "script".to_owned(),
        instance_id: format!("script-{node}"),
        node_claim: node.to_owned(),
        ..Hello::default()
    }
}

/// What a good gateway answers.
pub(crate) fn welcome() -> Welcome {
    Welcome { version: 1, gateway_id: "script".to_owned(), heartbeat_ms: 5_000, ..Welcome::default() }
}
