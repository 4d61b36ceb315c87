//! The one mapping from a refusal to what the caller sees. kube-apiserver shows a person only the status line, so the
//! cause stands in the reason phrase, in the body and in `Proxy-Status` (RFC 9209) alike.
//!
//! | status | when | `Proxy-Status` error |
//! | --- | --- | --- |
//! | 400 | the request cannot be understood, or its target is not `host:port` | `http_request_error` |
//! | 403 | the client may not ask, or the edge's own policy forbids the target | `http_request_denied` |
//! | 404 | no such node, and nobody is granted the host | `destination_not_found` |
//! | 405 | not CONNECT | `http_request_error` |
//! | 408 | the request's head did not come in time | `http_request_error` |
//! | 429 | the caller has as many streams to the node as one caller may | `connection_limit_reached` |
//! | 431 | the request's head is too long | `http_request_error` |
//! | 502 | the target refused (`connection_refused`), cannot be reached (`destination_ip_unroutable`), or its name is unknown (`dns_error`) | as said |
//! | 502 | the host is granted to several nodes: the caller can mend it by naming one | `destination_not_found` |
//! | 502 | the edge failed otherwise | `proxy_internal_error` |
//! | 503 | the node is offline, its link was lost, it drains, or this gateway does | `destination_unavailable` |
//! | 503 | the host is unknown, but what is known of other gateways is not whole | `destination_unavailable` |
//! | 503 | only a gateway that cannot be reached has a link to the node | `destination_unavailable` |
//! | 503 | the host is unknown, but the nodes have not been read from the cluster yet | `destination_unavailable` |
//! | 503 | the link or the edge is full | `connection_limit_reached` |
//! | 504 | the target was not connected in time | `connection_timeout` |
//!
//! A client that goes away before it is answered is counted as 499.

use http::StatusCode;
use tunnel_core::{GatewayId, NodeId, TargetError, proto::messages::RefusalCode};

use crate::route::RouteError;

/// Longest reason phrase, in bytes.
const MAX_REASON: usize = 200;

/// Why a request was not served.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// Not HTTP.
    #[error("the request cannot be understood: {0}")]
    Malformed(String),
    /// Not a target.
    #[error("the request's target is not usable: {0}")]
    Target(#[from] TargetError),
    /// Some other method.
    #[error("{method} is not served here: use CONNECT host:port")]
    NotConnect { method: String },
    /// Too slow.
    #[error("the request's head did not come within {millis} ms")]
    HeadTimedOut { millis: u128 },
    /// Too long.
    #[error("the request's head is longer than {max} bytes or has too many fields")]
    HeadTooLong { max: usize },
    /// The client's certificate is good, but not on the list.
    #[error("client {client} may not use this gateway: its name is not among the allowed clients")]
    ClientNotAllowed { client: String },
    /// The client's certificate is a node's.
    #[error(
        "the client's certificate is that of node {node}: edges connect at the edges' port, and no node may reach others through this gateway"
    )]
    ClientIsNode { node: NodeId },
    /// This gateway is about to leave.
    #[error("gateway {gateway} is about to leave: use another")]
    GatewayDraining { gateway: GatewayId },
    /// The request was understood, but did not reach its target.
    #[error(transparent)]
    Route(#[from] RouteError),
}

/// How a kind of refusal is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kind {
    status: StatusCode,
    /// RFC 9209, section 2.3.
    proxy_error: &'static str,
    label: &'static str,
    retry_after_secs: Option<u32>,
}

const fn kind(status: StatusCode, proxy_error: &'static str, label: &'static str) -> Kind {
    Kind { status, proxy_error, label, retry_after_secs: None }
}

const fn unavailable(proxy_error: &'static str, label: &'static str, retry_after_secs: u32) -> Kind {
    let retry_after_secs = Some(retry_after_secs);
    Kind { status: StatusCode::SERVICE_UNAVAILABLE, proxy_error, label, retry_after_secs }
}

impl Refusal {
    fn kind(&self) -> Kind {
        match self {
            Self::Malformed(_) => kind(StatusCode::BAD_REQUEST, "http_request_error", "malformed"),
            Self::Target(_) => kind(StatusCode::BAD_REQUEST, "http_request_error", "bad_target"),
            Self::NotConnect { .. } => {
                kind(StatusCode::METHOD_NOT_ALLOWED, "http_request_error", "not_connect")
            }
            Self::HeadTimedOut { .. } => {
                kind(StatusCode::REQUEST_TIMEOUT, "http_request_error", "head_timed_out")
            }
            Self::HeadTooLong { .. } => {
                kind(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "http_request_error", "head_too_long")
            }
            Self::ClientNotAllowed { .. } => {
                kind(StatusCode::FORBIDDEN, "http_request_denied", "client_not_allowed")
            }
            Self::ClientIsNode { .. } => kind(StatusCode::FORBIDDEN, "http_request_denied", "client_is_node"),
            Self::GatewayDraining { .. } => unavailable("destination_unavailable", "gateway_draining", 1),
            Self::Route(error) => route_kind(error),
        }
    }
}

fn route_kind(error: &RouteError) -> Kind {
    use RouteError as E;
    match error {
        E::NoSuchNode { .. } => kind(StatusCode::NOT_FOUND, "destination_not_found", "no_such_node"),
        E::Unsure { .. } => unavailable("destination_unavailable", "directory_incomplete", 1),
        E::NodesUnread { .. } => unavailable("destination_unavailable", "nodes_unread", 5),
        E::Ambiguous { .. } => kind(StatusCode::BAD_GATEWAY, "destination_not_found", "ambiguous"),
        E::Offline { .. } | E::Nowhere { .. } => unavailable("destination_unavailable", "offline", 5),
        E::Unreachable { .. } | E::OutOfReach { .. } => {
            unavailable("destination_unavailable", "peer_unreachable", 1)
        }
        E::Draining { .. } => unavailable("destination_unavailable", "draining", 1),
        E::LinkLost { .. } => unavailable("destination_unavailable", "link_lost", 1),
        E::GatewayFull { .. } | E::Overloaded { .. } => {
            unavailable("connection_limit_reached", "overloaded", 1)
        }
        E::CallerFull { .. } => Kind {
            status: StatusCode::TOO_MANY_REQUESTS,
            ..unavailable("connection_limit_reached", "caller_limit", 1)
        },
        E::TimedOut { .. } => kind(StatusCode::GATEWAY_TIMEOUT, "connection_timeout", "timed_out"),
        E::Protocol { .. } => kind(StatusCode::BAD_GATEWAY, "proxy_internal_error", "edge_protocol"),
        E::Refused { code, .. } => refused_kind(*code),
    }
}

fn refused_kind(code: RefusalCode) -> Kind {
    use RefusalCode as C;
    match code {
        C::NotAllowed => kind(StatusCode::FORBIDDEN, "http_request_denied", "target_not_allowed"),
        C::ConnectionRefused => kind(StatusCode::BAD_GATEWAY, "connection_refused", "connection_refused"),
        C::Unreachable => kind(StatusCode::BAD_GATEWAY, "destination_ip_unroutable", "unreachable"),
        C::NameNotResolved => kind(StatusCode::BAD_GATEWAY, "dns_error", "name_not_resolved"),
        C::DialTimeout => kind(StatusCode::GATEWAY_TIMEOUT, "connection_timeout", "dial_timeout"),
        C::Overloaded => unavailable("connection_limit_reached", "overloaded", 1),
        C::LinkLost => unavailable("destination_unavailable", "link_lost", 1),
        C::Draining => unavailable("destination_unavailable", "draining", 1),
        C::NoSuchNode => kind(StatusCode::NOT_FOUND, "destination_not_found", "no_such_node"),
        C::Unspecified | C::Malformed | C::Unsupported | C::Internal => {
            kind(StatusCode::BAD_GATEWAY, "proxy_internal_error", "edge_failed")
        }
    }
}

/// A refusal as the caller gets it, whichever version of HTTP it speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    /// The cause: printable ASCII, one line, at most [`MAX_REASON`] bytes.
    pub(crate) reason: String,
    /// All fields but those that say how long the body is.
    pub(crate) fields: Vec<(&'static str, String)>,
    /// For the metrics.
    pub(crate) label: &'static str,
}

impl Reply {
    pub(crate) fn to(refusal: &Refusal, gateway: &GatewayId) -> Self {
        let Kind { status, proxy_error, label, retry_after_secs } = refusal.kind();
        let reason = phrase(&refusal.to_string());
        // The prefix makes a token of every gateway id: those may begin with a digit.
        let proxy_status =
            format!("tunnel-server-{gateway}; error={proxy_error}; details={}", quoted(&reason));
        let mut fields =
            vec![("proxy-status", proxy_status), ("content-type", "text/plain; charset=utf-8".to_owned())];
        if let Some(seconds) = retry_after_secs {
            fields.push(("retry-after", seconds.to_string()));
        }
        if status == StatusCode::METHOD_NOT_ALLOWED {
            fields.push(("allow", "CONNECT".to_owned()));
        }
        Self { status, reason, fields, label }
    }

    /// The body: the reason again, as a line.
    pub(crate) fn body(&self) -> String {
        format!("{}\n", self.reason)
    }
}

/// A text as a reason phrase: whatever is not printable ASCII becomes `?`, runs of white space one space.
fn phrase(text: &str) -> String {
    let mut phrase = String::new();
    for word in text.split_whitespace() {
        if !phrase.is_empty() {
            phrase.push(' ');
        }
        phrase.extend(word.chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }));
    }
    if phrase.len() > MAX_REASON {
        phrase.truncate(MAX_REASON - 3);
        phrase.push_str("...");
    }
    phrase
}

/// A structured-field string (RFC 9651, section 3.3.3) of printable ASCII.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        if matches!(c, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(c);
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn reply(refusal: impl Into<Refusal>) -> Reply {
        Reply::to(&refusal.into(), &"1-gateway.example".parse().unwrap())
    }

    fn field<'a>(reply: &'a Reply, name: &str) -> Option<&'a str> {
        reply.fields.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    fn every_route_error() -> Vec<(RouteError, u16, &'static str)> {
        let node = || "edge-a".parse::<NodeId>().unwrap();
        let host = || "10.0.0.1".parse().unwrap();
        let text = || "why".to_owned();
        let (target, timeout) = ("edge-a:1".parse().unwrap(), Duration::from_secs(1));
        let mut all = vec![
            (RouteError::NoSuchNode { host: host() }, 404, "destination_not_found"),
            (RouteError::NodesUnread { host: host(), cause: text() }, 503, "destination_unavailable"),
            (RouteError::Unsure { host: host(), cause: text() }, 503, "destination_unavailable"),
            (
                RouteError::Nowhere {
                    node: node(),
                    gateway: "gw-b".parse().unwrap(),
                    ago: Duration::from_secs(3),
                },
                503,
                "destination_unavailable",
            ),
            (
                RouteError::OutOfReach {
                    node: node(),
                    gateway: "gw-b".parse().unwrap(),
                    ago: Duration::from_secs(3),
                },
                503,
                "destination_unavailable",
            ),
            (RouteError::Ambiguous { host: host(), nodes: vec![node()] }, 502, "destination_not_found"),
            (RouteError::Offline { node: node(), last_seen: None }, 503, "destination_unavailable"),
            (
                RouteError::Unreachable { node: node(), gateways: vec!["gw-b".parse().unwrap()] },
                503,
                "destination_unavailable",
            ),
            (RouteError::Draining { node: node() }, 503, "destination_unavailable"),
            (RouteError::GatewayFull { max: 9 }, 503, "connection_limit_reached"),
            (
                RouteError::CallerFull {
                    node: node(),
                    caller: "kube-apiserver".to_owned(),
                    max: 512.try_into().unwrap(),
                },
                429,
                "connection_limit_reached",
            ),
            (RouteError::Overloaded { node: node(), text: text() }, 503, "connection_limit_reached"),
            (RouteError::LinkLost { node: node(), text: text() }, 503, "destination_unavailable"),
            (RouteError::TimedOut { node: node(), target, timeout }, 504, "connection_timeout"),
            (RouteError::Protocol { node: node(), text: text() }, 502, "proxy_internal_error"),
        ];
        let codes = [
            (RefusalCode::Unspecified, 502, "proxy_internal_error"),
            (RefusalCode::Malformed, 502, "proxy_internal_error"),
            (RefusalCode::NotAllowed, 403, "http_request_denied"),
            (RefusalCode::ConnectionRefused, 502, "connection_refused"),
            (RefusalCode::Unreachable, 502, "destination_ip_unroutable"),
            (RefusalCode::NameNotResolved, 502, "dns_error"),
            (RefusalCode::DialTimeout, 504, "connection_timeout"),
            (RefusalCode::Overloaded, 503, "connection_limit_reached"),
            (RefusalCode::Draining, 503, "destination_unavailable"),
            (RefusalCode::Unsupported, 502, "proxy_internal_error"),
            (RefusalCode::Internal, 502, "proxy_internal_error"),
            (RefusalCode::NoSuchNode, 404, "destination_not_found"),
            (RefusalCode::LinkLost, 503, "destination_unavailable"),
        ];
        all.extend(codes.map(|(code, status, proxy_error)| {
            (RouteError::Refused { node: node(), code, text: text() }, status, proxy_error)
        }));
        all
    }

    #[test]
    fn every_route_error_has_its_reply() {
        for (error, status, proxy_error) in every_route_error() {
            let words = error.to_string();
            let reply = reply(error);
            assert_eq!((reply.status.as_u16(), reply.reason.as_str()), (status, words.as_str()));
            let expected =
                format!("tunnel-server-1-gateway.example; error={proxy_error}; details=\"{words}\"");
            assert_eq!(field(&reply, "proxy-status"), Some(expected.as_str()));
            let is_for_now = matches!(status, 429 | 503);
            assert_eq!(field(&reply, "retry-after").is_some(), is_for_now, "{words}");
            assert_eq!(reply.body(), format!("{words}\n"));
        }
    }

    #[test]
    fn what_others_said_cannot_break_the_head() {
        let said = format!("two\r\nlines \"quoted\\\" ünd mehr {}", "x".repeat(500));
        let reply = reply(Refusal::Malformed(said));
        assert!(reply.reason.len() <= MAX_REASON && reply.reason.ends_with("xxx..."));
        assert!(reply.reason.contains("two lines \"quoted\\\" ?nd mehr xxx"), "{}", reply.reason);
        let proxy_status = field(&reply, "proxy-status").unwrap();
        assert!(proxy_status.contains(r#"two lines \"quoted\\\" ?nd"#), "{proxy_status}");
    }
}
