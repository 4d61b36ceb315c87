//! Length-delimited messages: a varint length, then the encoded message, at most [`MAX_MESSAGE`] bytes.

use bytes::{Buf, BytesMut};
use prost::Message;

use super::MAX_MESSAGE;

/// Longest varint that can announce a permitted length: 64 KiB needs three bytes.
const MAX_LENGTH_PREFIX: usize = 3;

/// Bytes that are not a message of this protocol. The stream they came on is of no further use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The announced length is above [`MAX_MESSAGE`], or is no varint.
    #[error("a message longer than {MAX_MESSAGE} bytes was announced")]
    TooLong,
    /// The body does not decode as the expected message.
    #[error("a message could not be decoded: {0}")]
    Malformed(String),
}

/// Appends `message` to `out`.
///
/// # Errors
/// [`FrameError::TooLong`] if the message encodes to more than [`MAX_MESSAGE`] bytes; nothing is written then.
pub fn encode(message: &impl Message, out: &mut BytesMut) -> Result<(), FrameError> {
    let length = message.encoded_len();
    if length > MAX_MESSAGE {
        return Err(FrameError::TooLong);
    }
    out.reserve(length + MAX_LENGTH_PREFIX);
    message.encode_length_delimited(out).map_err(|_| FrameError::TooLong)
}

/// Takes one message off the front of `input`: `None` while more bytes are needed. Bytes behind the message stay.
///
/// Never needs more than [`MAX_MESSAGE`] and a few bytes to decide, so a bounded reader is enough.
pub fn decode<M: Message + Default>(input: &mut BytesMut) -> Result<Option<M>, FrameError> {
    let Some((length, prefix)) = length_prefix(input)? else { return Ok(None) };
    if input.len() < prefix + length {
        return Ok(None);
    }
    input.advance(prefix);
    let body = input.split_to(length).freeze();
    M::decode(body).map(Some).map_err(|error| FrameError::Malformed(error.to_string()))
}

/// The announced length and how many bytes announced it.
fn length_prefix(input: &[u8]) -> Result<Option<(usize, usize)>, FrameError> {
    let mut length = 0;
    for (index, byte) in input.iter().take(MAX_LENGTH_PREFIX).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return if length <= MAX_MESSAGE {
                Ok(Some((length, index + 1)))
            } else {
                Err(FrameError::TooLong)
            };
        }
    }
    if input.len() < MAX_LENGTH_PREFIX { Ok(None) } else { Err(FrameError::TooLong) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::messages::{Abort, Control, Open, OpenReply, Ping, control::Kind};
    use proptest::prelude::*;

    fn open() -> impl Strategy<Value = Open> {
        (any::<u64>(), ".{0,300}", ".{0,40}", ".{0,60}", any::<i32>(), ".{0,100}", any::<u32>()).prop_map(
            |(stream, target, request_id, traceparent, ingress, caller, timeout_ms)| Open {
                stream,
                target,
                request_id,
                traceparent,
                ingress,
                caller,
                node: String::new(),
                timeout_ms,
            },
        )
    }

    proptest! {
        #[test]
        fn round_trips_in_any_pieces(messages in proptest::collection::vec(open(), 1..5), cut in 1..50usize) {
            let mut wire = BytesMut::new();
            for message in &messages {
                encode(message, &mut wire).unwrap();
            }
            let mut input = BytesMut::new();
            let mut decoded = Vec::new();
            for piece in wire.chunks(cut) {
                input.extend_from_slice(piece);
                while let Some(message) = decode::<Open>(&mut input).unwrap() {
                    decoded.push(message);
                }
            }
            prop_assert_eq!(decoded, messages);
            prop_assert!(input.is_empty());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut input = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode::<Control>(&mut input) {}
            let mut input = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode::<OpenReply>(&mut input) {}
        }
    }

    #[test]
    fn an_unknown_kind_of_control_message_is_skipped() {
        // Field 99, length-delimited, one byte: a message type of the future.
        let mut input = BytesMut::from(&[4, 0x9a, 0x06, 1, 7][..]);
        let message = decode::<Control>(&mut input).unwrap().unwrap();
        assert_eq!(message.kind, None);
    }

    #[test]
    fn a_length_above_the_limit_is_refused_before_its_body_arrives() {
        let mut input = BytesMut::from(&[0x81, 0x80, 0x04][..]); // 65537
        assert_eq!(decode::<Control>(&mut input), Err(FrameError::TooLong));
        let mut input = BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..]);
        assert_eq!(decode::<Control>(&mut input), Err(FrameError::TooLong));
    }

    #[test]
    fn a_message_above_the_limit_is_not_sent() {
        let abort = Abort { stream: 1, code: 0, text: "x".repeat(MAX_MESSAGE) };
        let mut out = BytesMut::new();
        assert_eq!(encode(&abort, &mut out), Err(FrameError::TooLong));
        assert!(out.is_empty());
    }

    #[test]
    fn the_wire_format_does_not_drift() {
        let mut out = BytesMut::new();
        encode(&Control { kind: Some(Kind::Ping(Ping { id: 300 })) }, &mut out).unwrap();
        assert_eq!(&out[..], [5, 0x22, 3, 0x08, 0xac, 0x02]);
    }
}
