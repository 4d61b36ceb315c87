//! A client of Konnectivity's gRPC front, as kube-apiserver is one: a gRPC connection of its own for each connection that
//! is proxied. Used by `way`.

use std::{
    fs, io,
    path::Path,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use futures_util::{Stream, stream};
use http::uri::PathAndQuery;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
};
use tokio_util::sync::PollSender;
use tonic::{
    Request, Streaming,
    client::Grpc,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_prost::ProstCodec;

use crate::tls::{Files, TlsError};

const METHOD: &str = "/ProxyService/Proxy";
/// Packets on their way to gRPC. It has its own windows behind them.
const QUEUE: usize = 2;
/// Most bytes in a packet: as many as Go copies at once, and so kube-apiserver.
const PIECE: usize = 32 * 1024;

/// Konnectivity's messages: `konnectivity-client/proto/client/client.proto`. It has no package.
mod wire {
    use bytes::Bytes;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Packet {
        #[prost(enumeration = "PacketType", tag = "1")]
        pub(super) r#type: i32,
        #[prost(oneof = "Payload", tags = "2, 3, 4, 5, 6, 7")]
        pub(super) payload: Option<Payload>,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
    #[repr(i32)]
    pub(super) enum PacketType {
        DialReq = 0,
        DialRsp = 1,
        CloseReq = 2,
        CloseRsp = 3,
        Data = 4,
        DialCls = 5,
        Drain = 6,
    }

    #[derive(Clone, PartialEq, prost::Oneof)]
    pub(super) enum Payload {
        #[prost(message, tag = "2")]
        DialRequest(DialRequest),
        #[prost(message, tag = "3")]
        DialResponse(DialResponse),
        #[prost(message, tag = "4")]
        Data(Data),
        #[prost(message, tag = "5")]
        CloseRequest(CloseRequest),
        #[prost(message, tag = "6")]
        CloseResponse(CloseResponse),
        #[prost(message, tag = "7")]
        CloseDial(CloseDial),
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct DialRequest {
        #[prost(string, tag = "1")]
        pub(super) protocol: String,
        #[prost(string, tag = "2")]
        pub(super) address: String,
        #[prost(int64, tag = "3")]
        pub(super) random: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct DialResponse {
        #[prost(string, tag = "1")]
        pub(super) error: String,
        #[prost(int64, tag = "2")]
        pub(super) connect_id: i64,
        #[prost(int64, tag = "3")]
        pub(super) random: i64,
    }

    #[allow(clippy::struct_field_names, reason = "so it is called")]
    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Data {
        #[prost(int64, tag = "1")]
        pub(super) connect_id: i64,
        #[prost(string, tag = "2")]
        pub(super) error: String,
        #[prost(bytes = "bytes", tag = "3")]
        pub(super) data: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct CloseRequest {
        #[prost(int64, tag = "1")]
        pub(super) connect_id: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct CloseResponse {
        #[prost(string, tag = "1")]
        pub(super) error: String,
        #[prost(int64, tag = "2")]
        pub(super) connect_id: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct CloseDial {
        #[prost(int64, tag = "1")]
        pub(super) random: i64,
    }
}

use wire::{CloseRequest, Data, DialRequest, Packet, PacketType, Payload};

pub(crate) fn over_uds(path: &str) -> Endpoint {
    // tonic knows this scheme by itself.
    Endpoint::from_shared(format!("unix:{path}")).unwrap_or_else(|_| Endpoint::from_static("http://nowhere"))
}

pub(crate) fn over_tls(address: &str, files: &Files, name: String) -> Result<Endpoint, TlsError> {
    let (cert, key, ca) = (read(&files.cert)?, read(&files.key)?, read(&files.ca)?);
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca))
        .identity(Identity::from_pem(cert, key))
        .domain_name(name);
    let endpoint = Endpoint::from_shared(format!("https://{address}"));
    let endpoint = endpoint.and_then(|endpoint| endpoint.tls_config(tls));
    endpoint.map_err(|error| TlsError::Grpc { address: address.to_owned(), error: causes(&error) })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|error| TlsError::Read { path: path.to_owned(), error })
}

/// A proxied connection. It has no half-close: to end one half is to end it.
pub(crate) struct Connection {
    id: i64,
    packets: Streaming<Packet>,
    unread: Bytes,
    over: bool,
    /// Closed once its end has been asked for.
    to_front: PollSender<Packet>,
    asked_to_close: bool,
}

impl Connection {
    /// Connects to the front, and has it dial the target.
    pub(crate) async fn dial(endpoint: &Endpoint, target: &str) -> io::Result<Self> {
        let channel: Channel = endpoint.connect().await.map_err(|error| io::Error::other(causes(&error)))?;
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.map_err(|error| io::Error::other(causes(&error)))?;
        let (to_front, mut queue) = mpsc::channel(QUEUE);
        let random = rand::random::<i64>();
        let dial = DialRequest { protocol: "tcp".to_owned(), address: target.to_owned(), random };
        let first = packet(PacketType::DialReq, Payload::DialRequest(dial));
        to_front.try_send(first).map_err(|_| io::ErrorKind::BrokenPipe)?;
        let request = Request::new(stream::poll_fn(move |context| queue.poll_recv(context)));
        let codec = ProstCodec::<Packet, Packet>::default();
        let answer = grpc.streaming(request, PathAndQuery::from_static(METHOD), codec).await;
        let mut packets = answer.map_err(|status| io::Error::other(causes(&status)))?.into_inner();
        let id = answered(&mut packets, random).await?;
        let to_front = PollSender::new(to_front);
        Ok(Self { id, packets, unread: Bytes::new(), over: false, to_front, asked_to_close: false })
    }
}

/// The connection's id, once the target has been dialled.
async fn answered(packets: &mut Streaming<Packet>, random: i64) -> io::Result<i64> {
    loop {
        let packet = packets.message().await.map_err(|status| io::Error::other(causes(&status)))?;
        match packet.map(|packet| packet.payload) {
            Some(Some(Payload::DialResponse(answer))) if answer.random == random => {
                if answer.error.is_empty() {
                    return Ok(answer.connect_id);
                }
                return Err(io::Error::other(format!("the target cannot be dialled: {}", answer.error)));
            }
            Some(Some(Payload::CloseDial(close))) if close.random == random => {
                return Err(io::Error::other("the front gave up dialling the target"));
            }
            Some(_) => {}
            None => return Err(io::Error::other("the front ended the stream without an answer to the dial")),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.unread.is_empty() && !this.over {
            let packet = ready!(Pin::new(&mut this.packets).poll_next(context));
            let packet = packet.transpose().map_err(|status| io::Error::other(causes(&status)))?;
            match packet.map(|packet| packet.payload) {
                Some(Some(Payload::Data(data))) if data.connect_id == this.id => this.unread = data.data,
                Some(Some(Payload::CloseResponse(close))) if close.connect_id == this.id => {
                    if !close.error.is_empty() {
                        return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, close.error)));
                    }
                    this.over = true;
                }
                Some(_) => {}
                None if this.asked_to_close => this.over = true,
                None => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            }
        }
        let taken = this.unread.len().min(buffer.remaining());
        buffer.put_slice(&this.unread[..taken]);
        this.unread.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.to_front.poll_reserve(context)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        let taken = bytes.len().min(PIECE);
        let data = Bytes::copy_from_slice(&bytes[..taken]);
        let data = Data { connect_id: this.id, error: String::new(), data };
        let sent = this.to_front.send_item(packet(PacketType::Data, Payload::Data(data)));
        Poll::Ready(sent.map(|()| taken).map_err(|_| io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // gRPC sends everything at once.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.asked_to_close {
            ready!(this.to_front.poll_reserve(context)).map_err(|_| io::ErrorKind::BrokenPipe)?;
            let close = CloseRequest { connect_id: this.id };
            let sent = this.to_front.send_item(packet(PacketType::CloseReq, Payload::CloseRequest(close)));
            sent.map_err(|_| io::ErrorKind::BrokenPipe)?;
            this.asked_to_close = true;
        }
        Poll::Ready(Ok(()))
    }
}

fn packet(kind: PacketType, payload: Payload) -> Packet {
    Packet { r#type: kind.into(), payload: Some(payload) }
}

/// All causes of an error, since tonic's own text says no more than that there is one.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
