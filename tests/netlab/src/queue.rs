//! One netfilter queue, by the kernel's messages (`linux/netfilter/nfnetlink_queue.h`): to be told the number of each
//! packet, and to let all go up to a number. The wire's only way to packets; what is in them it never sees.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketType, netlink, recv, send, socket, sockopt},
};

/// How many packets wait in the kernel at most; what comes then is lost. A gigabit a second of ordinary packets for a
/// quarter of a second.
const PACKETS: u32 = 20_000;
/// What the news of that many packets takes.
const BUFFER: usize = 32 << 20;
/// How much news is read at a time, so that what is due does not wait for it.
const NEWS: usize = 1_000;

const SUBSYSTEM: u16 = 3 << 8;
const PACKET: u16 = SUBSYSTEM;
const CONFIG: u16 = SUBSYSTEM | 2;
const VERDICT_UP_TO: u16 = SUBSYSTEM | 3;
const ERROR: u16 = 2;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
/// Of netlink and of nfnetlink.
const HEADERS: usize = 16 + 4;

/// What the kernel said, or that it cannot be understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Kernel(#[from] io::Error),
    #[error("a message of the kernel is cut off or none that nfnetlink_queue has")]
    Malformed,
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Kernel(errno.into())
    }
}

#[derive(Debug)]
pub(crate) struct Queue {
    socket: OwnedFd,
    number: u16,
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Queue {
    /// Of this process's network.
    pub(crate) fn bind(number: u16) -> Result<Self, Error> {
        let socket = socket(AddressFamily::NETLINK, SocketType::RAW, Some(netlink::NETFILTER))?;
        sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)?;
        let queue = Self { socket, number };
        // Numbers without content, and large packets whole: the kernel need not cut what nobody reads.
        let numbers_only = [0, 0, 0, 0, 1];
        let whole = 4_u32.to_be_bytes();
        queue.tell(
            CONFIG,
            REQUEST | ACKNOWLEDGE,
            &[(1, &[1, 0, 0, 0]), (2, &numbers_only), (3, &PACKETS.to_be_bytes()), (4, &whole), (5, &whole)],
        )?;
        queue.acknowledged()?;
        Ok(queue)
    }

    /// The number of the last packet that came since, if one did.
    pub(crate) fn arrived(&self) -> Result<Option<u32>, Error> {
        let mut last = None;
        for _ in 0..NEWS {
            let mut bytes = [0; 1024];
            match recv(&self.socket, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((count, _)) => last = number_of(&bytes[..count])?.or(last),
                // No room for the news of a packet: the kernel has dropped it, as any full queue does.
                Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(last)
    }

    /// Lets go what has this number or came before it.
    pub(crate) fn accept(&self, last: u32) -> Result<(), Error> {
        let mut verdict = [0; 8];
        verdict[..4].copy_from_slice(&1_u32.to_be_bytes());
        verdict[4..].copy_from_slice(&last.to_be_bytes());
        self.tell(VERDICT_UP_TO, REQUEST, &[(2, &verdict)])
    }

    fn tell(&self, kind: u16, flags: u16, attributes: &[(u16, &[u8])]) -> Result<(), Error> {
        let mut message = vec![0; HEADERS];
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message[6..8].copy_from_slice(&flags.to_ne_bytes());
        message[18..20].copy_from_slice(&self.number.to_be_bytes());
        for (kind, value) in attributes {
            let length = u16::try_from(4 + value.len()).map_err(|_| Error::Malformed)?;
            message.extend_from_slice(&length.to_ne_bytes());
            message.extend_from_slice(&kind.to_ne_bytes());
            message.extend_from_slice(value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        let length = u32::try_from(message.len()).map_err(|_| Error::Malformed)?;
        message[..4].copy_from_slice(&length.to_ne_bytes());
        send(&self.socket, &message, SendFlags::empty())?;
        Ok(())
    }

    /// The first message is the answer: there are no packets before it.
    fn acknowledged(&self) -> Result<(), Error> {
        let mut bytes = [0; 1024];
        let (count, _) = recv(&self.socket, &mut bytes[..], RecvFlags::empty())?;
        number_of(&bytes[..count]).map(drop)
    }
}

/// Of the packet that a message is about, if it is about one; or the error that it reports.
fn number_of(message: &[u8]) -> Result<Option<u32>, Error> {
    match u16::from_ne_bytes(field(message, 4)?) {
        PACKET => {
            let mut at = HEADERS;
            loop {
                let length = usize::from(u16::from_ne_bytes(field(message, at)?));
                if u16::from_ne_bytes(field(message, at + 2)?) == 1 {
                    return Ok(Some(u32::from_be_bytes(field(message, at + 4)?)));
                }
                at += length.max(4).next_multiple_of(4);
            }
        }
        ERROR => match i32::from_ne_bytes(field(message, 16)?) {
            // What was let go was gone: the kernel drops what waits for an interface that goes down.
            0 => Ok(None),
            code if -code == Errno::NOENT.raw_os_error() => Ok(None),
            code => Err(Error::Kernel(io::Error::from_raw_os_error(-code))),
        },
        _ => Err(Error::Malformed),
    }
}

fn field<const N: usize>(message: &[u8], at: usize) -> Result<[u8; N], Error> {
    message.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).ok_or(Error::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, rest: &[u8]) -> Vec<u8> {
        let mut message = vec![0; 16];
        message[4..6].copy_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(rest);
        message
    }

    #[test]
    fn a_packet_is_known_by_the_number_in_its_header_wherever_that_stands() {
        let mut rest = vec![0; 4];
        for (kind, value) in [(10_u16, [9; 4]), (1, 4711_u32.to_be_bytes())] {
            rest.extend_from_slice(&8_u16.to_ne_bytes());
            rest.extend_from_slice(&kind.to_ne_bytes());
            rest.extend_from_slice(&value);
        }
        let whole = message(PACKET, &rest);
        assert!(matches!(number_of(&whole), Ok(Some(4711))));
        for end in 0..whole.len() {
            assert!(matches!(number_of(&whole[..end]), Err(Error::Malformed)), "cut off after {end} bytes");
        }
    }

    #[test]
    fn errors_are_told_but_for_packets_that_are_gone() {
        assert!(matches!(number_of(&message(ERROR, &0_i32.to_ne_bytes())), Ok(None)));
        assert!(matches!(number_of(&message(ERROR, &(-2_i32).to_ne_bytes())), Ok(None)));
        let refused = number_of(&message(ERROR, &(-1_i32).to_ne_bytes()));
        assert!(
            matches!(refused, Err(Error::Kernel(error)) if error.kind() == io::ErrorKind::PermissionDenied)
        );
    }
}
