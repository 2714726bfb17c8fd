//! The handshake: fixed newstyle, options until the client has chosen an export or leaves.
//!
//! ```text
//!  greeting -> client flags -> [ option -> replies ]* -> GO or EXPORT_NAME -> transmission
//!                                   |-> STARTTLS: the bytes of both sides are encrypted, all that was agreed is forgotten
//! ```

use super::Shared;
use super::export::{Context, Contexts, Export};
use crate::endian::{be32, be64, size};
use crate::nbd::input::Input;
use crate::nbd::stream::{Deadline, Stream};
use crate::nbd::tls::Policy;
use crate::nbd::wire::{self, Fields, Mode, handshake, info, option, reply};
use std::io;
use std::sync::Arc;

/// Longest data of an option, in bytes: a name and some queries.
const OPTION_BYTES_MAX: usize = 64 << 10;
/// Longest data that is let pass unseen.
const SKIP_MAX: u64 = 1 << 20;
/// Options that a client may send.
const OPTIONS_MAX: u32 = 4096;
/// Bytes of the greeting's tail that old clients want.
const ZEROES: [u8; 124] = [0; 124];

/// What was agreed.
pub struct Session {
    pub stream: Stream,
    pub input: Input,
    pub export: Arc<Export>,
    pub mode: Mode,
    pub contexts: Contexts,
}

/// How an option ended.
enum Next {
    Option,
    Encrypt,
    Transmission(Arc<Export>),
    Leave,
}

struct Haggling<'a> {
    shared: &'a Shared,
    stream: Stream,
    input: Input,
    deadline: Deadline,
    no_zeroes: bool,
    fixed: bool,
    mode: Mode,
    /// The contexts, and the export that they were chosen for.
    contexts: (String, Contexts),
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Talks with a client until it has chosen; `None` if it leaves.
pub fn negotiate(
    shared: &Shared,
    stream: Stream,
    input: Input,
    deadline: Deadline,
) -> io::Result<Option<Session>> {
    let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    let (init, word) = (wire::INIT.to_be_bytes(), wire::OPTION.to_be_bytes());
    stream.send(&[&[&init[..], &word, &flags.to_be_bytes()].concat()], deadline)?;
    let mut haggling = Haggling {
        shared,
        stream,
        input,
        deadline,
        no_zeroes: false,
        fixed: false,
        mode: Mode::Simple,
        contexts: Default::default(),
    };
    let answer = be32(haggling.input.need(&haggling.stream, 4, deadline)?, 0);
    haggling.input.consume(4);
    if answer & !u32::from(flags) != 0 {
        return Err(invalid("the client sets flags that were not offered"));
    }
    haggling.no_zeroes = answer & u32::from(handshake::NO_ZEROES) != 0;
    haggling.fixed = answer & u32::from(handshake::FIXED_NEWSTYLE) != 0;
    for _ in 0..OPTIONS_MAX {
        match haggling.option()? {
            Next::Option => {}
            Next::Encrypt => haggling = haggling.encrypt()?,
            Next::Leave => return Ok(None),
            Next::Transmission(export) => {
                let contexts = haggling.contexts_for(&export);
                let Haggling { stream, input, mode, .. } = haggling;
                return Ok(Some(Session { stream, input, export, mode, contexts }));
            }
        }
    }
    Err(invalid("the client sends options without end"))
}

impl Haggling<'_> {
    /// What was chosen for an export; what was chosen for another one does not count.
    fn contexts_for(&self, export: &Export) -> Contexts {
        let (name, contexts) = &self.contexts;
        let same = self.shared.find(name).is_some_and(|chosen| std::ptr::eq(Arc::as_ptr(&chosen), export));
        if same { *contexts } else { Contexts::default() }
    }

    fn flags(&self, export: &Export) -> u16 {
        let alone = self.shared.limits.connections_max <= 1;
        export.flags(self.mode, self.contexts_for(export), alone)
    }

    fn answer(&self, option: u32, kind: u32, parts: &[&[u8]]) -> io::Result<()> {
        let data = parts.concat();
        let len = u32::try_from(data.len()).unwrap_or(0);
        let head = [
            &wire::OPTION_REPLY.to_be_bytes()[..],
            &option.to_be_bytes(),
            &kind.to_be_bytes(),
            &len.to_be_bytes(),
            &data,
        ];
        self.stream.send(&[&head.concat()], self.deadline)
    }

    fn refuse(&self, option: u32, kind: u32, why: &str) -> io::Result<Next> {
        self.answer(option, kind, &[wire::message(why).as_bytes()])?;
        Ok(Next::Option)
    }

    /// Whether all but encrypting must be refused.
    fn must_encrypt(&self) -> bool {
        self.shared.tls.policy() == Policy::Required && !self.stream.is_encrypted()
    }

    fn option(&mut self) -> io::Result<Next> {
        let head = self.input.need(&self.stream, 16, self.deadline)?;
        let (word, option, len) = (be64(head, 0), be32(head, 8), be32(head, 12));
        if word != wire::OPTION {
            return Err(invalid("the client's option does not begin as one"));
        }
        self.input.consume(16);
        if size(len.into()) > OPTION_BYTES_MAX {
            if u64::from(len) > SKIP_MAX || option == option::EXPORT_NAME {
                return Err(invalid("the client's option is longer than any"));
            }
            self.input.skip(&self.stream, len.into(), self.deadline)?;
            return self.refuse(option, reply::ERR_TOO_BIG, "the option's data are too long");
        }
        let data = self.input.need(&self.stream, size(len.into()), self.deadline)?.to_vec();
        self.input.consume(data.len());
        if !self.fixed && option != option::EXPORT_NAME {
            return Err(invalid("the client sends options without fixed newstyle negotiation"));
        }
        if self.shared.is_stopping() && option != option::EXPORT_NAME {
            self.refuse(option, reply::ERR_SHUTDOWN, "the server is shutting down")?;
            return Ok(Next::Leave);
        }
        match option {
            option::EXPORT_NAME => self.export_name(&data),
            option::ABORT => {
                // The client may be gone already.
                let _ = self.answer(option, reply::ACK, &[]);
                Ok(Next::Leave)
            }
            option::STARTTLS => self.start_tls(&data),
            _ if self.must_encrypt() => self.refuse(option, reply::ERR_TLS_REQD, "this server wants TLS"),
            option::LIST => self.list(&data),
            option::INFO | option::GO => self.info(option, &data),
            option::STRUCTURED_REPLY => self.raise(option, Mode::Structured, &data),
            option::EXTENDED_HEADERS => self.raise(option, Mode::Extended, &data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, &data),
            _ => self.refuse(option, reply::ERR_UNSUP, "this option is not known here"),
        }
    }

    /// The option that knows no refusal but a closed connection.
    fn export_name(&mut self, data: &[u8]) -> io::Result<Next> {
        let name = Fields(data).string(data.len())?;
        let export = self.shared.find(name).filter(|_| !self.must_encrypt() && !self.shared.is_stopping());
        let export = export.ok_or_else(|| invalid("the client asks for an export that is not there"))?;
        let flags = self.flags(&export);
        let zeroes = if self.no_zeroes { &[][..] } else { &ZEROES };
        let parts = [&export.capacity().to_be_bytes()[..], &flags.to_be_bytes(), zeroes];
        self.stream.send(&[&parts.concat()], self.deadline)?;
        Ok(Next::Transmission(export))
    }

    fn start_tls(&mut self, data: &[u8]) -> io::Result<Next> {
        let option = option::STARTTLS;
        if self.shared.tls.policy() == Policy::Off {
            return self.refuse(option, reply::ERR_POLICY, "this server has no TLS");
        }
        if !data.is_empty() || self.stream.is_encrypted() {
            return self.refuse(option, reply::ERR_INVALID, "STARTTLS comes once, and without data");
        }
        // What came in the clear must not be taken for what came encrypted.
        if !self.input.have().is_empty() {
            return Err(invalid("the client sent bytes in the clear after STARTTLS"));
        }
        self.answer(option, reply::ACK, &[])?;
        Ok(Next::Encrypt)
    }

    fn encrypt(self) -> io::Result<Self> {
        let session = self.shared.tls.session()?;
        let stream = self.stream.start_tls(session, self.deadline)?;
        Ok(Self { stream, mode: Mode::Simple, contexts: Default::default(), ..self })
    }

    fn list(&self, data: &[u8]) -> io::Result<Next> {
        if !data.is_empty() {
            return self.refuse(option::LIST, reply::ERR_INVALID, "LIST has no data");
        }
        for export in &self.shared.exports {
            let len = u32::try_from(export.name.len()).unwrap_or(0).to_be_bytes();
            let parts = [&len[..], export.name.as_bytes(), export.description.as_bytes()];
            self.answer(option::LIST, reply::SERVER, &parts)?;
        }
        self.answer(option::LIST, reply::ACK, &[])?;
        Ok(Next::Option)
    }

    fn info(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        let mut fields = Fields(data);
        let asked = (|| {
            let name = fields.counted_string()?;
            let count = fields.u16()?;
            let wants = (0..count).map(|_| fields.u16()).collect::<io::Result<Vec<u16>>>()?;
            if fields.0.is_empty() { Ok((name, wants)) } else { Err(io::ErrorKind::InvalidData.into()) }
        })();
        let Ok::<_, io::Error>((name, wants)) = asked else {
            return self.refuse(option, reply::ERR_INVALID, "the option's data do not add up");
        };
        let Some(export) = self.shared.find(name) else {
            return self.refuse(option, reply::ERR_UNKNOWN, &format!("there is no export {name:?}"));
        };
        let flags = self.flags(&export);
        let tell = |what: u16, parts: &[&[u8]]| {
            self.answer(option, reply::INFO, &[&[&what.to_be_bytes()[..]], parts].concat())
        };
        tell(info::EXPORT, &[&export.capacity().to_be_bytes(), &flags.to_be_bytes()])?;
        if wants.contains(&info::NAME) {
            tell(info::NAME, &[export.name.as_bytes()])?;
        }
        if wants.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            tell(info::DESCRIPTION, &[export.description.as_bytes()])?;
        }
        if wants.contains(&info::BLOCK_SIZE) {
            let sizes = [1, 4096, wire::PAYLOAD_MAX].map(u32::to_be_bytes);
            tell(info::BLOCK_SIZE, &[&sizes.concat()])?;
        }
        self.answer(option, reply::ACK, &[])?;
        Ok(if option == option::GO { Next::Transmission(export) } else { Next::Option })
    }

    /// Structured replies, or extended headers, which have them too.
    fn raise(&mut self, option: u32, mode: Mode, data: &[u8]) -> io::Result<Next> {
        if !data.is_empty() {
            return self.refuse(option, reply::ERR_INVALID, "this option has no data");
        }
        if self.mode >= mode {
            let more = self.mode > mode;
            let kind = if more { reply::ERR_EXT_HEADER_REQD } else { reply::ERR_INVALID };
            return self.refuse(option, kind, "that was agreed before");
        }
        self.mode = mode;
        self.answer(option, reply::ACK, &[])?;
        Ok(Next::Option)
    }

    fn meta_context(&mut self, option: u32, data: &[u8]) -> io::Result<Next> {
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.contexts = Default::default();
        }
        if self.mode == Mode::Simple {
            return self.refuse(option, reply::ERR_INVALID, "contexts need structured replies");
        }
        let mut fields = Fields(data);
        let asked = (|| {
            let name = fields.counted_string()?;
            let count = fields.u32()?;
            let mut queries = Vec::new();
            for _ in 0..count {
                queries.push(fields.counted_string()?);
            }
            if fields.0.is_empty() { Ok((name, queries)) } else { Err(io::ErrorKind::InvalidData.into()) }
        })();
        let Ok::<_, io::Error>((name, queries)) = asked else {
            return self.refuse(option, reply::ERR_INVALID, "the option's data do not add up");
        };
        let Some(_) = self.shared.find(name) else {
            return self.refuse(option, reply::ERR_UNKNOWN, &format!("there is no export {name:?}"));
        };
        let wanted = |context: &Context| {
            let own = context.name();
            let family = own.split_inclusive(':').next();
            queries.iter().any(|query| *query == own || (!set && Some(*query) == family))
                || (!set && queries.is_empty())
        };
        let mut contexts = Contexts::default();
        for context in Context::ALL.into_iter().filter(wanted) {
            let id = if set { context.id() } else { 0 };
            self.answer(option, reply::META_CONTEXT, &[&id.to_be_bytes(), context.name().as_bytes()])?;
            contexts.add(context);
        }
        if set {
            self.contexts = (name.to_owned(), contexts);
        }
        self.answer(option, reply::ACK, &[])?;
        Ok(Next::Option)
    }
}
