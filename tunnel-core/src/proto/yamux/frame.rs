//! The header of a yamux frame: twelve bytes, big-endian. A body follows only the header of a data frame.

/// Bytes of a header.
pub const HEADER: usize = 12;

/// The only version there is.
const VERSION: u8 = 0;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of a stream; as many as the header's length says follow it.
    Data,
    /// The length is what the far side may send more on the stream.
    WindowUpdate,
    /// The length is a number that comes back with [`Flags::ACK`].
    Ping,
    /// The connection ends; the length is one of [`GoAway`]'s codes.
    GoAway,
}

/// What a frame says of its stream beside what it brings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flags(u16);

impl Flags {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// The first frame of a stream by the side that opens it; of a ping, the question.
    pub const SYN: Self = Self(1);
    /// The first frame of a stream by the other side; of a ping, the answer.
    pub const ACK: Self = Self(2);
    /// No more bytes come on the stream.
    pub const FIN: Self = Self(4);
    /// The stream is over in both directions.
    pub const RST: Self = Self(8);

    /// Whether all of `other` are set.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// These and those.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Why a side ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum GoAway {
    /// It has no more use for it.
    Normal = 0,
    /// The other side broke the protocol.
    ProtocolError = 1,
    /// Something went wrong in itself.
    InternalError = 2,
}

/// A frame without its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// What it says of its stream.
    pub flags: Flags,
    /// The stream's number; 0 for frames of the connection itself.
    pub stream: u32,
    /// See [`Kind`].
    pub length: u32,
}

/// Bytes that are no header of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The first byte is none that a header may begin with.
    #[error("yamux version {0} instead of {VERSION}")]
    Version(u8),
    /// Nobody knows what would follow.
    #[error("yamux frame of unknown type {0}")]
    Kind(u8),
}

impl Header {
    /// The last frame of a connection.
    pub fn go_away(code: GoAway) -> Self {
        Self { kind: Kind::GoAway, flags: Flags::NONE, stream: 0, length: code as u32 }
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let kind = match self.kind {
            Kind::Data => 0,
            Kind::WindowUpdate => 1,
            Kind::Ping => 2,
            Kind::GoAway => 3,
        };
        let mut bytes = [0; HEADER];
        bytes[0] = VERSION;
        bytes[1] = kind;
        bytes[2..4].copy_from_slice(&self.flags.0.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// What the bytes say. Flags that nobody knows are kept and mean nothing.
    pub fn decode(bytes: &[u8; HEADER]) -> Result<Self, HeaderError> {
        let [version, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = *bytes;
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        let kind = match kind {
            0 => Kind::Data,
            1 => Kind::WindowUpdate,
            2 => Kind::Ping,
            3 => Kind::GoAway,
            other => return Err(HeaderError::Kind(other)),
        };
        Ok(Self {
            kind,
            flags: Flags(u16::from_be_bytes([f0, f1])),
            stream: u32::from_be_bytes([s0, s1, s2, s3]),
            length: u32::from_be_bytes([l0, l1, l2, l3]),
        })
    }
}
