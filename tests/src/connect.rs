//! An HTTP/1.1 CONNECT as kube-apiserver sends it, and the reply taken apart.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What a gateway said instead of 200.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// The only part that kube-apiserver shows to a person.
    pub reason: String,
    /// Header names in lower case, with their values.
    pub headers: Vec<(String, String)>,
    /// All of it.
    pub body: String,
}

impl Refusal {
    /// A header's value, empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value)
    }

    /// Checks what every refusal must have: a cause in the reason phrase, `Proxy-Status`, one line of body.
    pub fn check(&self) -> Result<(), String> {
        let generic = ["", "Not Found", "Bad Gateway", "Service Unavailable", "Gateway Timeout", "Forbidden"];
        let retry = self.status != 503 || self.header("retry-after").parse::<u32>().is_ok();
        let lines = self.body.lines().count();
        if generic.contains(&&*self.reason)
            || !self.header("proxy-status").contains("error=")
            || lines != 1
            || !retry
        {
            return Err(format!("a refusal without its cause: {self:?}"));
        }
        Ok(())
    }
}

/// Sends the CONNECT as kube-apiserver does, with a Host that must not matter, and reads the reply's head.
///
/// `Ok(Err(_))` is a refusal. kube-apiserver fails on any byte behind a 200 before it has spoken; so does this.
pub async fn connect<S>(stream: &mut S, target: &str) -> io::Result<Result<(), Refusal>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let head = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.flush().await?;
    reply(stream).await
}

/// Reads a reply to a CONNECT.
pub async fn reply<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Result<(), Refusal>> {
    let mut bytes = Vec::new();
    loop {
        let mut piece = [0; 1024];
        let read = stream.read(&mut piece).await?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the gateway closed without a reply"));
        }
        bytes.extend_from_slice(&piece[..read]);
        let mut headers = [httparse::EMPTY_HEADER; 32];
        let mut response = httparse::Response::new(&mut headers);
        let parsed = response.parse(&bytes).map_err(io::Error::other)?;
        let httparse::Status::Complete(length) = parsed else { continue };
        let status = response.code.unwrap_or_default();
        if status == 200 {
            let surplus = bytes.len() - length;
            return if surplus == 0 {
                Ok(Ok(()))
            } else {
                Err(io::Error::other(format!("{surplus} bytes came right behind the 200")))
            };
        }
        let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
        let headers = response
            .headers
            .iter()
            .map(|header| (header.name.to_ascii_lowercase(), text(header.value)))
            .collect();
        let reason = response.reason.unwrap_or_default().to_owned();
        let mut body = bytes.split_off(length);
        stream.read_to_end(&mut body).await?;
        return Ok(Err(Refusal { status, reason, headers, body: text(&body) }));
    }
}
